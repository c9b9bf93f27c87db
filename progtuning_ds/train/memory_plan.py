"""What a job will hold, predicted before any weight is loaded, and its micro-batches. No torch, no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import (
    Batch,
    Budget,
    EngineSetup,
    Footprint,
    Workload,
    divisors,
    fewest_waiting,
    format_bytes,
    leaving_parts,
    parse_bytes,
    setup_from_deepspeed,
)
from progtuning_ds.train.job import Job

_CONTEXT = 2**30
_FRAGMENTATION = 0.05


@dataclass(frozen=True)
class MemoryPlan:
    """The prediction for every stage.

    Attributes:
        load: model and stages.
        budget: bytes of a rank's device, None where there is no limit.
        setups: the engine of each stage; they differ in what waits in host memory.
        batches: forward passes of each stage.
        footprints: what a rank holds in each stage.
    """

    load: Workload
    budget: Budget | None
    setups: tuple[EngineSetup, ...]
    batches: tuple[Batch, ...]
    footprints: tuple[Footprint, ...]

    def problem(self, stage: int, beyond: int = 0) -> str | None:
        """One line on why a stage does not fit, or None.

        Args:
            stage: its index.
            beyond: bytes found on the device beyond what was predicted, which stay.
        """
        footprint, budget = self.footprints[stage], self.budget
        if budget is None or footprint.peak + beyond <= budget.usable:
            return None
        needed = footprint.peak + beyond + budget.reserve
        largest = max(footprint.device, key=lambda name: footprint.device[name])
        found = f", {format_bytes(beyond)} more than predicted are held already" if beyond > 0 else ""
        return (
            f"memory.budget is {format_bytes(budget.device)} per rank but stage {stage + 1}/{len(self.footprints)} is "
            f"predicted to need {format_bytes(needed)} ({footprint.peak_moment}: "
            f"{largest.replace('_', ' ')} {format_bytes(footprint.device[largest])}, "
            f"reserve {format_bytes(budget.reserve)}{found}); {self.advice(stage)}"
        )

    def with_first_rows(self) -> MemoryPlan:
        """Return the plan with no stage's rows per pass above the first one's."""
        first = self.batches[0].micro_batch
        batches = tuple(
            replace(batch, micro_batch=first, accumulation=batch.micro_batch * batch.accumulation // first)
            if batch.micro_batch > first
            else batch
            for batch in self.batches
        )
        footprints = tuple(self.load.footprint(self.setups[stage], batch, stage) for stage, batch in enumerate(batches))
        return replace(self, batches=batches, footprints=footprints)

    def advice(self, stage: int) -> str:
        """Say what would lower the peak of a stage."""
        batch, device = self.batches[stage], self.footprints[stage].device
        largest = max(device, key=lambda name: device[name])
        if largest in ("activations", "logits"):
            if batch.micro_batch > 1:
                smaller = [size for size in divisors(batch.micro_batch) if size < batch.micro_batch]
                fits = [size for size in reversed(smaller) if self.budget and self._fits_with(stage, size)]
                if fits:
                    return f"set train.micro_batch_size to {fits[0]} or give more"
            if not batch.checkpointing:
                return "set model.gradient_checkpointing to true, shorten task.max_length, or give more"
            return "shorten task.max_length or give more"
        setup = self.setups[stage]
        if setup.zero_stage < 3 and setup.world_size > 1:
            return "use deepspeed=zero3, offload the optimizer (zero2_offload), use more ranks, or give more"
        if not setup.offload_optimizer:
            return "offload the optimizer (deepspeed=zero2_offload or zero3_offload), use more ranks, or give more"
        return "use more ranks or give more"

    def _fits_with(self, stage: int, micro_batch: int) -> bool:
        assert self.budget is not None
        batch = self.batches[stage]
        passes = batch.accumulation * batch.micro_batch // micro_batch
        smaller = replace(batch, micro_batch=micro_batch, accumulation=passes)
        return self.load.footprint(self.setups[stage], smaller, stage).peak <= self.budget.usable


def plan_memory(job: Job, device: str, held: int) -> MemoryPlan:
    """Predict every stage of a job, and choose its micro-batches as the settings ask.

    Args:
        job: the run.
        device: ``cpu`` or the name of an accelerator.
        held: bytes of this process now, before anything is loaded; the reserve on the CPU.

    Raises:
        ConfigError: if the micro-batches do not fit the stages or the rows of a step.
    """
    load = job.workload
    budget = _budget(job, device, held)
    first = setup_from_deepspeed(
        job.deepspeed,
        job.settings.world_size,
        kernel="deepspeed" if job.config.optimizer.kernel == "deepspeed" else "fused",
        quantization=job.config.method.quantization,
        double_quant=job.config.method.double_quant,
    )
    count = len(job.plan.stages)
    first = replace(first, host_parts=_host_parts(job, load), on_freeze=job.config.schedule.on_freeze)
    sizes = _given_sizes(job, count)
    batches = [_batch(job, device, size) for size in sizes]
    setups = [first] * count
    if budget is not None and job.config.memory.reinvest == "micro_batch":
        batches = [batches[0], *(_enlarge(load, first, batches[0], stage, budget) for stage in range(1, count))]
    if budget is not None and job.config.memory.reinvest == "unoffload":
        setups = [fewest_waiting(load, first, batches[stage], stage, budget.usable) for stage in range(count)]
    footprints = tuple(load.footprint(setups[stage], batches[stage], stage) for stage in range(count))
    return MemoryPlan(load, budget, tuple(setups), tuple(batches), footprints)


def default_reserve(device: str, budget: int, held: int) -> int:
    """Bytes of a budget that are for no tensor.

    On a GPU the CUDA context, NCCL and cuBLAS (1 GiB) and fragmentation (5%); on the CPU what the process holds.
    """
    return held if device == "cpu" else _CONTEXT + int(_FRAGMENTATION * budget)


def _budget(job: Job, device: str, held: int) -> Budget | None:
    memory = job.config.memory
    if memory.budget is None:
        return None
    size = parse_bytes("memory.budget", memory.budget)
    if memory.reserve is None:
        reserve = default_reserve(device, size, held)
    else:
        reserve = parse_bytes("memory.reserve", memory.reserve) if memory.reserve else 0
    if reserve >= size:
        raise ConfigError(
            f"memory.budget must be above the reserve of {format_bytes(reserve)}, got {format_bytes(size)}"
        )
    return Budget(size, None, reserve)


def _given_sizes(job: Job, stages: int) -> Sequence[int]:
    sizes = job.config.memory.micro_batch_sizes
    if sizes is None:
        return [job.settings.micro_batch_size] * stages
    if len(sizes) != stages:
        raise ConfigError(f"memory.micro_batch_sizes must hold one size for each of the {stages} stages, got {sizes}")
    rows = job.settings.global_batch_size // job.settings.world_size
    for index, size in enumerate(sizes):
        if rows % size:
            near = min(divisors(rows), key=lambda divisor: abs(divisor - size))
            raise ConfigError(
                f"memory.micro_batch_sizes[{index}] must divide the {rows} rows of a step on each rank, got {size}; "
                f"nearest: {near}"
            )
    return sizes


def _batch(job: Job, device: str, micro_batch: int) -> Batch:
    rows = job.settings.global_batch_size // job.settings.world_size
    attention = job.config.model.attn_implementation or "sdpa"
    kinds = {"eager": "eager", "sdpa": "sdpa"}
    return Batch(
        micro_batch=micro_batch,
        seq_len=max(job.task.train.lengths),
        accumulation=rows // micro_batch,
        checkpointing=job.config.model.gradient_checkpointing,
        attention=kinds.get(attention, "flash"),
        device="cpu" if device == "cpu" else "cuda",
    )


def _enlarge(load: Workload, setup: EngineSetup, batch: Batch, stage: int, budget: Budget) -> Batch:
    """The largest multiple of a batch's rows per pass that fits in a stage; the batch itself where none does."""
    rows = batch.micro_batch * batch.accumulation
    best = batch
    for size in divisors(rows):
        larger = replace(batch, micro_batch=size, accumulation=rows // size)
        # Multiples only, so that a pass can be cut into those of the first stage again.
        if size % batch.micro_batch == 0 and load.footprint(setup, larger, stage).peak <= budget.usable:
            best = larger
    return best


def _host_parts(job: Job, load: Workload) -> tuple[int, ...]:
    """Parts whose moments wait in host memory, by the stage after which they leave."""
    wanted, zero = job.config.memory.host_state, job.deepspeed.get("zero_optimization", {})
    if wanted == "none":
        return ()
    obstacles = {
        "deepspeed offloads the optimizer already": bool(zero.get("offload_optimizer")),
        "ZeRO stage 0 steps all groups at once": job.zero_stage == 0,
        f"optimizer.kernel {job.config.optimizer.kernel} updates all groups in one pass": (
            job.config.optimizer.kernel != "deepspeed"
        ),
        "the stages do not only shrink": not job.plan.is_shrinking,
    }
    for reason, stands in obstacles.items():
        if stands:
            raise ConfigError(f"memory.host_state must be none here, got {wanted}: {reason}")
    leaving = leaving_parts(load)
    return leaving[:1] if wanted == "lowest_part" else leaving
