"""Finds the cheapest configuration that fits a budget in every stage. Standard library only.

All configurations are tried in the order of their least possible cost; the search ends when no later one can be
cheaper. What did not fit is kept with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from progtuning_ds.memory.choices import Choice, choices, divisors, fewest_waiting, leaving_parts, setup_of
from progtuning_ds.memory.footprint import Footprint
from progtuning_ds.memory.request import Budget, Request
from progtuning_ds.memory.setup import Batch, EngineSetup
from progtuning_ds.memory.workload import Workload


@dataclass(frozen=True, slots=True)
class StageChoice:
    """One stage of a proposal.

    Attributes:
        micro_batch: rows per forward pass.
        accumulation: passes per step.
        footprint: what a rank holds.
        cost: of a step, in tokens of compute.
        host_parts: parts whose moments wait in host memory (``EngineSetup.host_parts``).
    """

    micro_batch: int
    accumulation: int
    footprint: Footprint
    cost: float
    host_parts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration that fits every stage.

    Attributes:
        choice: what is the same throughout.
        setup: the engine, but for what waits in host memory.
        stages: what is chosen stage by stage.
        cost: the mean of a step, in tokens of compute.
        lowest_part: the part that leaves first, by its last stage.
    """

    choice: Choice
    setup: EngineSetup
    stages: tuple[StageChoice, ...]
    cost: float
    lowest_part: int = 0

    @property
    def host_state(self) -> str:
        """``memory.host_state`` of a run: ``none``, ``lowest_part`` or ``all``."""
        waiting = [stage.host_parts for stage in self.stages]
        if not any(waiting):
            return "none"
        lowest = [(self.lowest_part,) if index <= self.lowest_part else () for index in range(len(waiting))]
        return "lowest_part" if waiting == lowest else "all"

    @property
    def unoffload(self) -> bool:
        """Whether moments have to come home as room appears (``memory.reinvest``)."""
        return self.host_state == "all"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a configuration does not fit: the stage that needs most at one row per pass, and what it needs there."""

    choice: Choice
    stage: int
    footprint: Footprint
    missing: int
    where: str

    @property
    def largest(self) -> tuple[str, int]:
        """The category that takes most, and its bytes."""
        held = self.footprint.device if self.where == "device" else self.footprint.host
        name = max(held, key=lambda key: held[key])
        return name, held[name]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The cheapest proposal or None, and what was found not to fit on the way, cheapest first."""

    proposal: Proposal | None
    failures: tuple[Failure, ...]


def search(load: Workload, request: Request) -> Outcome:
    """Find the configuration of least cost that fits every stage."""
    bounds = sorted(
        (
            (_least_cost(choice, load, request), index, choice)
            for index, choice in enumerate(choices(request.kernels, shrinking=load.plan.is_shrinking))
            if load.why_not_quantized(setup_of(choice, load, request)) is None
        )
    )
    best: Proposal | None = None
    failures: list[Failure] = []
    for bound, _, choice in bounds:
        if best is not None and bound >= best.cost:
            break
        found = try_choice(choice, load, request)
        if isinstance(found, Failure):
            failures.append(found)
        elif best is None or found.cost < best.cost:
            best = found
    return Outcome(best, tuple(failures))


def try_choice(choice: Choice, load: Workload, request: Request) -> Proposal | Failure:
    """The cheapest micro-batches of a choice, or the stage that fits none."""
    setup = setup_of(choice, load, request)
    may_wait = replace(setup, host_parts=leaving_parts(load) if choice.host_state else ())
    stages: list[StageChoice] = []
    failures: list[Failure] = []
    for stage in load.plan.stages:
        fitting: list[StageChoice] = []
        closest: list[Failure] = []
        # Not monotonous: a single pass per step holds no gradients while its activations are most.
        for micro_batch in divisors(request.rows_per_rank):
            batch = _batch(choice, request, micro_batch)
            one = fewest_waiting(load, may_wait, batch, stage.index, request.budget.usable)
            footprint = load.footprint(one, batch, stage.index)
            failure = _check(choice, stage.index, footprint, request.budget)
            if failure is None:
                cost = stage_cost(choice, load, request, stage.index, micro_batch, one.host_parts)
                fitting.append(StageChoice(micro_batch, batch.accumulation, footprint, cost, one.host_parts))
            else:
                closest.append(failure)
        if fitting:
            stages.append(min(fitting, key=lambda one: one.cost))
        else:
            failures.append(min(closest, key=lambda failure: failure.missing))
    if failures:
        return max(failures, key=lambda failure: failure.missing)
    cost = _mean(load, [stage.cost for stage in stages])
    return Proposal(choice, setup, tuple(stages), cost, leaving_parts(load)[0])


def stage_cost(
    choice: Choice,
    load: Workload,
    request: Request,
    stage: int,
    micro_batch: int,
    host_parts: Sequence[int] = (),
) -> float:
    """Cost of one step in a stage, in tokens of compute; moments of ``host_parts`` wait in host memory."""
    trained = load.trained(stage) / load.params.numel
    waiting = sum(group.numel for group in load.groups(stage) if group.last_stage in host_parts)
    one = request.costs.forward_pass(
        micro_batch * request.seq_len,
        zero_stage=choice.zero_stage,
        ranks=request.gpus,
        checkpointing=choice.checkpointing,
        offload_param=choice.offload_param,
        trained=trained,
    )
    return one * (request.rows_per_rank // micro_batch) + request.costs.step(
        zero_stage=choice.zero_stage,
        ranks=request.gpus,
        offload_optimizer=choice.offload_optimizer,
        fused=choice.kernel == "fused",
        trained=trained,
        waiting=waiting / load.params.numel,
    )


def _batch(choice: Choice, request: Request, micro_batch: int) -> Batch:
    return Batch(
        micro_batch=micro_batch,
        seq_len=request.seq_len,
        accumulation=request.rows_per_rank // micro_batch,
        checkpointing=choice.checkpointing,
        attention=request.attention,
        device=request.device,
    )


def _check(choice: Choice, stage: int, footprint: Footprint, budget: Budget) -> Failure | None:
    over = footprint.peak - budget.usable
    if over > 0:
        return Failure(choice, stage, footprint, over, "device")
    if budget.host is not None and footprint.host_total > budget.host:
        return Failure(choice, stage, footprint, footprint.host_total - budget.host, "host")
    return None


def _least_cost(choice: Choice, load: Workload, request: Request) -> float:
    """Cost if the largest micro-batch fitted everywhere."""
    costs = [stage_cost(choice, load, request, s.index, request.rows_per_rank) for s in load.plan.stages]
    return _mean(load, costs)


def _mean(load: Workload, costs: Sequence[float]) -> float:
    steps = [len(stage.steps) for stage in load.plan.stages]
    return sum(cost * count for cost, count in zip(costs, steps, strict=True)) / sum(steps)
