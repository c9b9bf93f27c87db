"""Finds the cheapest configuration that fits a budget in every stage. Standard library only.

All configurations are tried in the order of their least possible cost; the search ends when no later one can be
cheaper. What did not fit is kept with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from progtuning_ds.errors import ConfigError, require_choice
from progtuning_ds.memory.activations import DEVICES
from progtuning_ds.memory.architecture import ATTENTIONS
from progtuning_ds.memory.costs import CostModel
from progtuning_ds.memory.footprint import Footprint, Workload
from progtuning_ds.memory.setup import KERNELS, PRECISIONS, Batch, EngineSetup

MAX_GPUS = 1024
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes a rank may use.

    Attributes:
        device: on the device.
        host: in host memory; None does not limit it.
        reserve: of the device, kept for what is no tensor: CUDA context, NCCL, cuBLAS workspaces, fragmentation.
    """

    device: int
    host: int | None = None
    reserve: int = 0

    def __post_init__(self) -> None:
        if self.reserve >= self.device:
            raise ConfigError(f"memory must be above the {self.reserve} bytes held in reserve, got {self.device}")

    @property
    def usable(self) -> int:
        """Bytes left for tensors."""
        return self.device - self.reserve


@dataclass(frozen=True, slots=True)
class Request:
    """What shall run on what."""

    gpus: int
    budget: Budget
    seq_len: int
    global_batch: int
    precision: str = "bf16"
    attention: str = "sdpa"
    device: str = "cuda"
    kernels: tuple[str, ...] = ("deepspeed",)
    frozen_bits: int = 16
    costs: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        for name in ("gpus", "seq_len", "global_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
        if self.gpus > MAX_GPUS:
            raise ConfigError(f"gpus must be within 1..{MAX_GPUS}, got {self.gpus}")
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("attention", self.attention, ATTENTIONS)
        require_choice("device", self.device, DEVICES)
        for kernel in self.kernels:
            require_choice("kernel", kernel, KERNELS)
        if self.global_batch % self.gpus:
            below = self.global_batch // self.gpus * self.gpus
            near = f"{below} or {below + self.gpus}" if below else f"{self.gpus}"
            raise ConfigError(
                f"global_batch must be a multiple of the {self.gpus} GPUs, got {self.global_batch}; nearest: {near}"
            )

    @property
    def rows_per_rank(self) -> int:
        """Rows of an optimizer step on one rank."""
        return self.global_batch // self.gpus


@dataclass(frozen=True, slots=True)
class Choice:
    """What one run has throughout; micro-batches are chosen stage by stage."""

    zero_stage: int
    offload_optimizer: bool
    offload_param: bool
    checkpointing: bool
    kernel: str

    def __str__(self) -> str:
        """Say it in words."""
        words = [f"ZeRO-{self.zero_stage}"]
        words += ["optimizer offload"] * self.offload_optimizer + ["parameter offload"] * self.offload_param
        words += ["activation checkpointing"] * self.checkpointing
        words += [f"{self.kernel} kernel"] * (self.kernel != "deepspeed")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class StageChoice:
    """One stage of a proposal: rows per forward pass, passes per step, and what a rank holds."""

    micro_batch: int
    accumulation: int
    footprint: Footprint
    cost: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration that fits every stage. ``cost`` is the mean of a step, in tokens of compute."""

    choice: Choice
    setup: EngineSetup
    stages: tuple[StageChoice, ...]
    cost: float


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


def choices(kernels: Sequence[str] = ("deepspeed",)) -> tuple[Choice, ...]:
    """Every configuration that may be proposed."""
    placements = [(0, False, False), (1, False, False), (2, False, False), (3, False, False)]
    placements += [(2, True, False), (3, True, False), (3, True, True)]
    return tuple(
        Choice(stage, optimizer, param, checkpointing, kernel)
        for (stage, optimizer, param), checkpointing, kernel in product(placements, (False, True), kernels)
        # The fused step replaces ZeRO's, on state that lies on the device.
        if kernel != "fused" or (stage > 0 and not optimizer)
    )


def setup_of(choice: Choice, load: Workload, request: Request) -> EngineSetup:
    """The engine of a choice, with the bucket sizes that the written DeepSpeed JSON has."""
    hidden = load.shape.hidden if load.shape else 4096
    setup = EngineSetup(
        zero_stage=choice.zero_stage,
        world_size=request.gpus,
        precision=request.precision,
        offload_optimizer=choice.offload_optimizer,
        offload_param=choice.offload_param,
        kernel=choice.kernel,
        frozen_bits=request.frozen_bits,
        overlap_comm=choice.zero_stage in (1, 2),
    )
    if choice.zero_stage == 0:
        return setup
    setup = replace(setup, reduce_bucket=bucket_numel(hidden))
    if choice.zero_stage < 3:
        return setup
    return replace(
        setup,
        prefetch_bucket=int(0.9 * bucket_numel(hidden)),
        persistence_threshold=10 * hidden,
        max_live=live_numel(load),
    )


def bucket_numel(hidden: int) -> int:
    """Elements of a gradient bucket, as transformers fills ``"auto"``, but not below a million."""
    return max(hidden * hidden, 1_000_000)


def live_numel(load: Workload) -> int:
    """Elements that ZeRO-3 may keep gathered: two blocks or the largest parameter, as little as training needs."""
    by_block: dict[str | int, int] = {}
    for param in load.params.params:
        if isinstance(param.component, int):
            by_block[param.component] = by_block.get(param.component, 0) + param.numel
    largest = max((param.numel for param in load.params.params), default=0)
    return max(2 * max(by_block.values(), default=0), largest)


def search(load: Workload, request: Request) -> Outcome:
    """Find the configuration of least cost that fits every stage."""
    bounds = sorted(
        ((_least_cost(choice, load, request), index, choice) for index, choice in enumerate(choices(request.kernels)))
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
    stages: list[StageChoice] = []
    failures: list[Failure] = []
    for stage in load.plan.stages:
        fitting: list[StageChoice] = []
        closest: list[Failure] = []
        # Not monotonous: a single pass per step holds no gradients while its activations are most.
        for micro_batch in divisors(request.rows_per_rank):
            batch = _batch(choice, request, micro_batch)
            footprint = load.footprint(setup, batch, stage.index)
            failure = _check(choice, stage.index, footprint, request.budget)
            if failure is None:
                cost = stage_cost(choice, load, request, stage.index, micro_batch)
                fitting.append(StageChoice(micro_batch, batch.accumulation, footprint, cost))
            else:
                closest.append(failure)
        if fitting:
            stages.append(min(fitting, key=lambda one: one.cost))
        else:
            failures.append(min(closest, key=lambda failure: failure.missing))
    if failures:
        return max(failures, key=lambda failure: failure.missing)
    return Proposal(choice, setup, tuple(stages), _mean(load, [stage.cost for stage in stages]))


def stage_cost(choice: Choice, load: Workload, request: Request, stage: int, micro_batch: int) -> float:
    """Cost of one step in a stage, in tokens of compute."""
    trained = load.trained(stage) / load.params.numel
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
    )


def divisors(number: int) -> tuple[int, ...]:
    """Divisors in rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


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


# ---- what would fit --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the request under which something fits."""

    words: str
    proposal: Proposal


def remedies(load: Workload, request: Request) -> Iterator[Remedy]:
    """Look for the smallest change of each kind under which something fits: GPUs, memory, length, adapters."""
    gpus = request.gpus
    while gpus < MAX_GPUS:
        gpus = min(2 * gpus, MAX_GPUS)
        batch = -(-request.global_batch // gpus) * gpus
        found = search(load, replace(request, gpus=gpus, global_batch=batch)).proposal
        if found:
            more = f" (global batch {batch})" if batch != request.global_batch else ""
            yield Remedy(f"{gpus} GPUs instead of {request.gpus}{more}: {found.choice}", found)
            break
    smaller = request.seq_len
    while smaller > 128:
        smaller = max(128, smaller // 2)
        found = search(load, replace(request, seq_len=smaller)).proposal
        if found:
            yield Remedy(f"sequences of {smaller} tokens instead of {request.seq_len}: {found.choice}", found)
            break
    for bits, name in ((16, "LoRA (rank 16)"), (4, "LoRA (rank 16) on a 4-bit base")):
        if load.shape is None:
            break
        adapted = Workload(load.params.with_adapters(load.shape, rank=16), load.shape, load.plan)
        found = search(adapted, replace(request, frozen_bits=bits)).proposal
        if found:
            yield Remedy(f"{name}: {found.choice}", found)
            break


def least_memory(failures: Sequence[Failure], budget: Budget) -> tuple[Choice, int] | None:
    """Of what failed on the device, the choice that comes nearest and the memory per GPU it would need."""
    on_device = [failure for failure in failures if failure.where == "device"]
    if not on_device:
        return None
    nearest = min(on_device, key=lambda failure: failure.missing)
    needed = budget.device + nearest.missing
    return nearest.choice, -(-needed // _MIB) * _MIB
