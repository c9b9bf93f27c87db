"""What may be proposed: everything a run has throughout, and the engine each gives. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from progtuning_ds.memory.request import Request
from progtuning_ds.memory.setup import Batch, EngineSetup
from progtuning_ds.memory.workload import Workload


@dataclass(frozen=True, slots=True)
class Choice:
    """What one run has throughout; micro-batches are chosen stage by stage.

    With ``host_state`` Adam's moments of as many parts as a stage needs wait in host memory between steps, those first
    that leave first.
    """

    zero_stage: int
    offload_optimizer: bool
    offload_param: bool
    checkpointing: bool
    kernel: str
    host_state: bool = False

    def __str__(self) -> str:
        """Say it in words."""
        words = [f"ZeRO-{self.zero_stage}"]
        words += ["optimizer offload"] * self.offload_optimizer + ["parameter offload"] * self.offload_param
        words += ["moments on the host"] * self.host_state
        words += ["activation checkpointing"] * self.checkpointing
        words += [f"{self.kernel} kernel"] * (self.kernel != "deepspeed")
        return ", ".join(words)


def choices(kernels: Sequence[str] = ("deepspeed",), *, shrinking: bool = True) -> tuple[Choice, ...]:
    """Every configuration that may be proposed.

    Args:
        kernels: who may do the optimizer step.
        shrinking: whether stages only shrink, which moments that wait in host memory need.
    """
    placements = [(0, False, False), (1, False, False), (2, False, False), (3, False, False)]
    placements += [(2, True, False), (3, True, False), (3, True, True)]
    return tuple(
        Choice(stage, optimizer, param, checkpointing, kernel, host_state)
        for host_state, (stage, optimizer, param), checkpointing, kernel in product(
            (False, True), placements, (False, True), kernels
        )
        # The fused step replaces ZeRO's, on state that lies on the device; so does who lets moments wait.
        if kernel != "fused" or (stage > 0 and not optimizer)
        if not host_state or (shrinking and stage > 0 and not optimizer and kernel == "deepspeed")
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
        on_freeze=request.on_freeze,
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


def leaving_parts(load: Workload) -> tuple[int, ...]:
    """Parts that train in the first stage, each by the index of its last stage, which leave first to last."""
    return tuple(sorted({group.last_stage for group in load.groups(0)}))


def fewest_waiting(load: Workload, setup: EngineSetup, batch: Batch, stage: int, usable: int) -> EngineSetup:
    """Let only as many parts wait in host memory as a stage needs to fit, those first that leave first.

    Args:
        load: model and plan.
        setup: the engine; its ``host_parts`` may wait.
        batch: a forward pass.
        stage: which stage.
        usable: bytes of the device.

    Returns:
        The engine with the fewest ``host_parts``; with all that are left in this stage if not even they suffice.
    """
    parts = [part for part in setup.host_parts if part >= stage]
    low, high = 0, len(parts)
    while low < high:  # each part that waits lowers the peak
        middle = (low + high) // 2
        fewer = replace(setup, host_parts=tuple(parts[:middle]))
        low, high = (low, middle) if load.footprint(fewer, batch, stage).peak <= usable else (middle + 1, high)
    return replace(setup, host_parts=tuple(parts[:low]))


def divisors(number: int) -> tuple[int, ...]:
    """Divisors in rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))
