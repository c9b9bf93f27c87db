"""Keeps a run within its budget and spends what stages give back. No deepspeed.runtime.

Before a stage begins the prediction, corrected by what is held already, is checked against the budget. Once it has
begun the micro-batch is set to what the plan of memory says. A setting that is new is on probation for its first
forward pass: if memory runs out on any rank there, all ranks go back to the rows of the first stage, for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from progtuning_ds.memory import format_bytes
from progtuning_ds.schedule import Stage
from progtuning_ds.tasks import Batch
from progtuning_ds.train.assembly import Built
from progtuning_ds.train.host_state import HostMoments
from progtuning_ds.train.memory_plan import MemoryPlan
from progtuning_ds.train.memory_use import MemoryUse, reset_peak
from progtuning_ds.train.outcome import MemoryBudgetError
from progtuning_ds.train.ranks import Ranks
from progtuning_ds.train.records import MemoryRecord

logger = logging.getLogger(__name__)


class MemoryControl:
    """Watches one run.

    Args:
        plan: the prediction.
        built: the engine.
        ranks: this process among the others.
        say: speaks to the user, on the first rank only.
    """

    def __init__(self, plan: MemoryPlan, built: Built, ranks: Ranks, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.built = built
        self.ranks = ranks
        self.say = say
        self.micro_batches = [batch.micro_batch for batch in plan.batches]
        self._rows = plan.batches[0].micro_batch * plan.batches[0].accumulation
        self._on_probation = False
        self._fell_back = False
        self._away: HostMoments | None = None
        if plan.setups[0].host_parts:
            self._away = HostMoments(built.stages.adapter.torch_optimizer, len(plan.setups))

    # ---- boundaries --------------------------------------------------------------------------------------------

    def before(self, stage: Stage) -> None:
        """Check the budget before a stage's transition. Collective.

        Raises:
            MemoryBudgetError: on all ranks, if any of them is predicted to need more than its budget.
        """
        if self.plan.budget is None:
            return
        problem = self.plan.problem(stage.index, self._beyond())
        problems = [line for line in self.ranks.gather(problem) if line is not None]
        if problems:
            raise MemoryBudgetError(f"stopped before stage {stage.index + 1}: {problem or problems[0]}")

    def entered(self, stage: Stage) -> None:
        """Set the micro-batch of a stage that has begun, or goes on after a resume."""
        size = self.micro_batches[stage.index]
        engine = self.built.engine
        if size != engine.train_micro_batch_size_per_gpu():
            before = engine.train_micro_batch_size_per_gpu()
            set_micro_batch(engine, size)
            self._on_probation = size > self.micro_batches[0]
            self.say(
                f"  {size} rows per pass instead of {before}: {engine.gradient_accumulation_steps()} passes per step"
            )
        if self._away is not None:
            came = self._away.keep_away(self.plan.setups[stage.index].host_parts)
            if came:
                self.say(f"  {format_bytes(came)} of moments moved from host memory to the device")
        reset_peak()

    def record(self, stage: Stage) -> MemoryRecord:
        """What the stage held against what was predicted; call it at the stage's end."""
        use, held = MemoryUse.read(), self.built.stages.memory()
        footprint, budget = self.plan.footprints[stage.index], self.plan.budget
        return MemoryRecord(
            stage=stage.index,
            step=stage.steps.stop - 1,
            micro_batch=self.micro_batches[stage.index],
            accumulation=self._rows // self.micro_batches[stage.index],
            predicted=dict(footprint.device),
            predicted_host=dict(footprint.host),
            predicted_peak=footprint.peak,
            measured=held,
            measured_peak=use.peak,
            fragmentation=use.fragmentation,
            host=use.host,
            budget=budget.device if budget else None,
            reserve=budget.reserve if budget else 0,
            fell_back=self._fell_back,
        )

    def _beyond(self) -> int:
        """Bytes on an accelerator beyond the states that the model of memory knows of; the reserve covers the CPU's."""
        if self.ranks.device.type == "cpu":
            return 0
        known = sum(self.built.stages.memory().values())
        return max(0, MemoryUse.read().device - known)

    # ---- passes ------------------------------------------------------------------------------------------------

    def passes(self, stage: Stage, batches: list[Batch], forward: Callable[[Batch], torch.Tensor]) -> Iterator[Any]:
        """Yield the loss of every forward pass of a step; the caller runs backward and step on each.

        Args:
            stage: the current one.
            batches: as they were loaded; cut where this run has fallen back to fewer rows.
            forward: runs the model on a batch and returns its loss.
        """
        queue = [piece for batch in batches for piece in cut(batch, self.micro_batches[stage.index])]
        if self._on_probation:
            self._on_probation = False
            loss = self._try_first(stage, forward, queue[0])
            if loss is None:
                self._fall_back(stage)
                queue = [piece for batch in queue for piece in cut(batch, self.micro_batches[stage.index])]
            else:
                yield loss
                del loss
                queue = queue[1:]
        for batch in queue:
            yield forward(batch)

    def _try_first(self, stage: Stage, forward: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor | None:
        """The loss of a first forward pass, or None if memory ran out on any rank. Collective."""
        if any(self.ranks.gather(not self._has_room(stage))):
            return None
        if self.plan.setups[stage.index].zero_stage == 3:
            return forward(batch)  # gathers weights on the way: a rank that ran out would leave the others waiting
        loss, ran_out = None, False
        random = _random_state()
        try:
            loss = forward(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if any(self.ranks.gather(ran_out)):
            _set_random_state(random)  # the rows see the dropout that they would have seen
            return None
        return loss

    def _has_room(self, stage: Stage) -> bool:
        """Whether what a pass is predicted to need can be had in one piece, beside what is held."""
        forward = self.plan.footprints[stage.index].moments["forward"]
        passing = sum(forward.get(name, 0) for name in ("activations", "logits", "buckets", "gathered"))
        try:
            torch.empty(passing, dtype=torch.uint8, device=self.ranks.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _fall_back(self, stage: Stage) -> None:
        self._fell_back = True
        tried = self.micro_batches[stage.index]
        self.micro_batches = [min(size, self.micro_batches[0]) for size in self.micro_batches]
        if self.ranks.device.type != "cpu":
            torch.cuda.empty_cache()
        set_micro_batch(self.built.engine, self.micro_batches[stage.index])
        self.say(
            f"warning: memory ran out with {tried} rows per pass; back to {self.micro_batches[stage.index]}, "
            "for the rest of the run"
        )


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def set_micro_batch(engine: Any, size: int) -> None:
    """Change rows per pass and passes per step of a live engine between two steps; rows per step stay."""
    rows = engine.train_batch_size()
    engine.set_train_micro_batch_size(size)
    engine.set_train_batch_size(rows)
    # DeepSpeed ends a step where its count of passes is a multiple of the passes per step.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def cut(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into pieces of up to ``size`` rows, in order."""
    rows = next(iter(batch.values())).shape[0]
    if rows <= size:
        return [batch]
    return [{name: values[at : at + size] for name, values in batch.items()} for at in range(0, rows, size)]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on the accelerator or in the process."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
