"""Runs a few steps of every stage on the longest rows and measures what is held. No deepspeed.runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from progtuning_ds.config import RunConfig
from progtuning_ds.memory import CATEGORIES
from progtuning_ds.schedule import Stage
from progtuning_ds.tasks import Batch
from progtuning_ds.train.assembly import Built, build
from progtuning_ds.train.engine_config import check_engine_config
from progtuning_ds.train.job import Job, prepare_job
from progtuning_ds.train.memory_control import MemoryControl
from progtuning_ds.train.memory_plan import MemoryPlan, plan_memory
from progtuning_ds.train.memory_use import MemoryUse, reset_peak
from progtuning_ds.train.ranks import Ranks, hardware, memory_bytes, start_ranks
from progtuning_ds.train.tensor_bytes import TensorBytes


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """One stage on one rank; bytes.

    Attributes:
        stage: its index.
        micro_batch: rows per pass.
        accumulation: passes per step.
        seq_len: tokens of the longest row.
        predicted: by category at the predicted peak.
        predicted_host: what stays in host memory.
        predicted_peak: on the device.
        measured: states by category (``StageEngine.memory``).
        measured_peak: most bytes of tensors: the allocator's on an accelerator, the dispatcher's count on the CPU.
        fragmentation: taken by the allocator at its peak, and used by no tensor.
        process: most of the resident set.
        seconds: median time of a step.
    """

    stage: int
    micro_batch: int
    accumulation: int
    seq_len: int
    predicted: dict[str, int]
    predicted_host: dict[str, int]
    predicted_peak: int
    measured: dict[str, int]
    measured_peak: int
    fragmentation: int
    process: int
    seconds: float

    @property
    def deviation(self) -> float:
        """Predicted peak over measured peak, less one."""
        return self.predicted_peak / self.measured_peak - 1


@dataclass(frozen=True)
class Profile:
    """All stages on the first rank."""

    job: Job
    plan: MemoryPlan
    records: tuple[ProfileRecord, ...]


def run_profile(config: RunConfig, *, steps: int = 2, snapshots: Path | None = None) -> Profile:
    """Build the engine and run some steps of every stage; nothing is saved. Collective.

    Args:
        config: the run.
        steps: optimizer steps per stage, of which the first is not timed where there are more.
        snapshots: folder for a PyTorch memory snapshot per stage; on CUDA only.

    Raises:
        ConfigError: as training would.
    """
    ranks = start_ranks()
    job = ranks.local_first(lambda: _prepare(config, ranks))
    plan = plan_memory(job, ranks.device.type, max(ranks.gather(memory_bytes(ranks.device))))
    built = build(job, ranks)
    try:
        control = MemoryControl(plan, built, ranks, lambda _: None)
        built.engine.train()
        records = [_measure(job, built, ranks, control, plan, stage, steps, snapshots) for stage in job.plan.stages]
    finally:
        built.close()
    return Profile(job, plan, tuple(records))


def _prepare(config: RunConfig, ranks: Ranks) -> Job:
    job = prepare_job(config, hardware(ranks))
    check_engine_config(job.deepspeed, job.deepspeed_name)
    return job


def _measure(
    job: Job,
    built: Built,
    ranks: Ranks,
    control: MemoryControl,
    plan: MemoryPlan,
    stage: Stage,
    steps: int,
    snapshots: Path | None,
) -> ProfileRecord:
    built.stages.advance(stage.steps.start)
    control.entered(stage)
    size = control.micro_batches[stage.index]
    passes = plan.batches[stage.index].accumulation
    batch = longest_batch(job, size, ranks.device)

    def step() -> None:
        for _ in range(passes):
            loss = job.task.loss(built.engine, batch)
            built.engine.backward(loss)
            built.engine.step()

    step()  # allocates optimizer state, records ZeRO-3's trace
    times = []
    reset_peak()
    with _recording(snapshots, stage):
        peak = _peak_of(step)
        for _ in range(steps - 1):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
    use, footprint = MemoryUse.read(), plan.footprints[stage.index]
    return ProfileRecord(
        stage=stage.index,
        micro_batch=size,
        accumulation=passes,
        seq_len=plan.batches[stage.index].seq_len,
        predicted={name: footprint.device[name] for name in CATEGORIES if footprint.device.get(name)},
        predicted_host=dict(footprint.host),
        predicted_peak=footprint.peak,
        measured=built.stages.memory(),
        measured_peak=use.peak if ranks.device.type != "cpu" else peak,
        fragmentation=use.fragmentation,
        process=MemoryUse.read().peak if ranks.device.type == "cpu" else use.host,
        seconds=sorted(times)[len(times) // 2] if times else 0.0,
    )


def longest_batch(job: Job, rows: int, device: torch.device) -> Batch:
    """A batch of the longest training rows, on the device: what needs most."""
    lengths = job.task.train.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    chosen = [order[index % len(order)] for index in range(rows)]
    batch = job.task.collate([job.task.train.rows[index] for index in chosen])
    return {name: values.to(device) for name, values in batch.items()}


def _peak_of(step: Callable[[], None]) -> int:
    """Most bytes of tensors during a step."""
    with TensorBytes() as count:
        count.watch_all()
        step()
    return count.peak


@contextmanager
def _recording(folder: Path | None, stage: Stage) -> Iterator[None]:
    """Write a PyTorch memory snapshot of a stage where one is asked for and there is a GPU."""
    if folder is None or not torch.cuda.is_available():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(folder / f"snapshot_stage{stage.index + 1}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
