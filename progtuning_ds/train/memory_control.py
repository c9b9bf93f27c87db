"""Keeps a run within its budget and spends what stages give back. No deepspeed.runtime.

Before a stage begins the prediction, corrected by what is held already, is checked against the budget. Once it has
begun the micro-batch is set to what the plan of memory says. One that is larger than the first stage's is rehearsed
on the longest rows first: if memory runs out on any rank, all ranks go back to the rows of the first stage, for good,
and the run directory remembers. Where there can be no rehearsal (ZeRO-3), or where one was not enough, memory that
runs out ends the run; resumed, it takes the rows of the first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from progtuning_ds.memory import format_bytes
from progtuning_ds.schedule import Stage
from progtuning_ds.train.assembly import Built
from progtuning_ds.train.host_state import HostMoments
from progtuning_ds.train.job import Job
from progtuning_ds.train.memory_plan import MemoryPlan
from progtuning_ds.train.memory_use import MemoryUse, reset_peak
from progtuning_ds.train.outcome import MemoryBudgetError, OutOfMemoryEndError
from progtuning_ds.train.ranks import Ranks
from progtuning_ds.train.records import MemoryRecord
from progtuning_ds.train.rehearsal import longest_batch, rehearse
from progtuning_ds.train.shortage import SHORTAGE, Shortage, is_out_of_memory, remember, remembered


class MemoryControl:
    """Watches one run.

    Args:
        job: the run.
        plan: the prediction.
        built: the engine.
        ranks: this process among the others.
        say: speaks to the user, on the first rank only.
        folder: the run directory, which remembers what ran out of memory; None remembers nothing.
    """

    def __init__(
        self,
        job: Job,
        plan: MemoryPlan,
        built: Built,
        ranks: Ranks,
        say: Callable[[str], None],
        folder: Path | None = None,
    ) -> None:
        self.job = job
        self.plan = plan
        self.built = built
        self.ranks = ranks
        self.say = say
        self._folder = folder
        self._fell_back = False
        self._away: HostMoments | None = None
        if any(setup.host_parts for setup in plan.setups):
            self._away = HostMoments(built.stages.adapter, len(plan.setups))
        self._recall()

    @property
    def micro_batches(self) -> list[int]:
        """Rows per pass of every stage, as they are now."""
        return [batch.micro_batch for batch in self.plan.batches]

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

    def entered(self, stage: Stage) -> bool:
        """Set the micro-batch of a stage that has begun, or goes on after a resume. Collective.

        Returns:
            Whether `micro_batches` are not what they were: the run has fallen back to fewer rows.
        """
        if self._away is not None:
            came = self._away.keep_away(self.plan.setups[stage.index].host_parts)
            if came:
                self.say(f"  {format_bytes(came)} of moments moved from host memory to the device")
        size, first = self.micro_batches[stage.index], self.micro_batches[0]
        short = size > first and any(self.ranks.gather(not self._has_room(stage)))
        if short:
            self._fall_back(stage)
            size = first
        engine = self.built.engine
        before = engine.train_micro_batch_size_per_gpu()
        if size != before:
            set_micro_batch(engine, size)
            passes = engine.gradient_accumulation_steps()
            self.say(f"  {size} rows per pass instead of {before}: {passes} pass{'es' * (passes > 1)} per step")
        reset_peak()
        return short

    def record(self, stage: Stage, measured_peak: int | None = None) -> MemoryRecord:
        """What the stage held against what was predicted; call it at the stage's end.

        Args:
            stage: the current one.
            measured_peak: most bytes of tensors, where somebody counted them.
        """
        use, on_cpu = MemoryUse.read(), self.ranks.device.type == "cpu"
        footprint, budget, batch = self.plan.footprints[stage.index], self.plan.budget, self.plan.batches[stage.index]
        return MemoryRecord(
            stage=stage.index,
            step=stage.steps.stop - 1,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            seq_len=batch.seq_len,
            predicted={name: size for name, size in footprint.device.items() if size},
            predicted_host=dict(footprint.host),
            predicted_peak=footprint.peak,
            measured=self.built.stages.memory(),
            measured_peak=use.peak if measured_peak is None or not on_cpu else measured_peak,
            fragmentation=use.fragmentation,
            host=use.peak if on_cpu else use.host,
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

    # ---- where memory runs out ----------------------------------------------------------------------------------

    @contextmanager
    def watching(self, stage: Stage) -> Iterator[None]:
        """Turn memory that runs out in a step of a stage into one line, and remember it.

        Raises:
            OutOfMemoryEndError: on the ranks where memory ran out; others may be waiting for them.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryEndError(self._obituary(stage)) from error

    def _has_room(self, stage: Stage) -> bool:
        """Whether a pass of a stage that is about to get more rows finds the memory it needs."""
        footprint, batch = self.plan.footprints[stage.index], self.plan.batches[stage.index]
        forward, backward = footprint.moments["forward"], footprint.moments["backward"]
        held = forward.get("gradients", 0) - footprint.states.get("gradients", 0)
        ballast = held + backward.get("buckets", 0)
        if self.plan.setups[stage.index].zero_stage == 3:
            # A pass gathers weights on the way, and a rank that ran out would leave the others waiting.
            passing = sum(forward.get(name, 0) for name in ("activations", "logits", "gathered"))
            return can_allocate(ballast + passing, self.ranks.device)
        longest = longest_batch(self.job, batch.micro_batch, self.ranks.device)
        return rehearse(self.job.task, self.built.module, longest, ballast)

    def _fall_back(self, stage: Stage) -> None:
        tried = self.micro_batches[stage.index]
        self._back_to_first()
        if self.ranks.device.type != "cpu":
            torch.cuda.empty_cache()
        if self.ranks.is_first:
            self._remember(stage, tried)
        self.say(
            f"warning: memory ran out with {tried} rows per pass; back to {self.micro_batches[0]}, for the rest of "
            "the run"
        )

    def _back_to_first(self) -> None:
        self._fell_back = True
        self.plan = self.plan.with_first_rows()

    def _obituary(self, stage: Stage) -> str:
        size, first = self.micro_batches[stage.index], self.micro_batches[0]
        what = f"memory ran out in stage {stage.index + 1}/{len(self.micro_batches)} with {size} rows per pass"
        if size > first:
            self._remember(stage, size)
            return (
                f"{what}; the same command with --resume auto goes on with {first} "
                f"(as memory.reinvest=none and no memory.micro_batch_sizes would)"
            )
        smaller = max((other for other in range(1, size) if size % other == 0), default=None)
        if smaller is not None:
            return f"{what}; set train.micro_batch_size={smaller} and go on with --resume auto"
        return f"{what}, the fewest there can be; {self.plan.advice(stage.index)}"

    def _remember(self, stage: Stage, tried: int) -> None:
        if self._folder is not None:
            setup = self.plan.setups[stage.index]
            first = self.micro_batches[0]
            remember(self._folder, Shortage(stage.index, tried, first, setup.world_size, setup.zero_stage))

    def _recall(self) -> None:
        """Do not try again what a run in this directory ran out of memory with. Collective."""
        if self._folder is None or max(self.micro_batches) <= self.micro_batches[0]:
            return
        known = next((one for one in self.ranks.gather(remembered(self._folder)) if one is not None), None)
        if known is not None:
            self._back_to_first()
            self.say(
                f"{known.micro_batch} rows per pass ran out of memory in stage {known.stage + 1} before: "
                f"{self.micro_batches[0]} in all stages (remove {self._folder / SHORTAGE} to try again)"
            )


def can_allocate(size: int, device: torch.device) -> bool:
    """Whether so many bytes can be had in one piece."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def set_micro_batch(engine: Any, size: int) -> None:
    """Change rows per pass and passes per step of a live engine between two steps; rows per step stay."""
    rows = engine.train_batch_size()
    engine.set_train_micro_batch_size(size)
    engine.set_train_batch_size(rows)
    # DeepSpeed ends a step where its count of passes is a multiple of the passes per step.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
