"""Runs a few steps of every stage on the longest rows and measures what is held. No deepspeed.runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from progtuning_ds.config import RunConfig
from progtuning_ds.schedule import Stage
from progtuning_ds.train.assembly import build
from progtuning_ds.train.engine_config import check_engine_config
from progtuning_ds.train.job import Job, prepare_job
from progtuning_ds.train.memory_control import MemoryControl
from progtuning_ds.train.memory_plan import MemoryPlan, plan_memory
from progtuning_ds.train.memory_use import reset_peak
from progtuning_ds.train.ranks import Ranks, hardware, memory_bytes, start_ranks
from progtuning_ds.train.records import MemoryRecord
from progtuning_ds.train.rehearsal import longest_batch
from progtuning_ds.train.tensor_bytes import TensorBytes


@dataclass(frozen=True)
class Profile:
    """All stages on this rank; ``seconds`` is the median time of a step in each, 0 where none was timed."""

    job: Job
    plan: MemoryPlan
    records: tuple[MemoryRecord, ...]
    seconds: tuple[float, ...]


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
        control = MemoryControl(job, plan, built, ranks, lambda _: None)
        built.engine.train()
        found = [_measure(control, stage, steps, snapshots) for stage in job.plan.stages]
    finally:
        built.close()
    records, seconds = zip(*found, strict=True)
    return Profile(job, control.plan, records, seconds)


def _prepare(config: RunConfig, ranks: Ranks) -> Job:
    job = prepare_job(config, hardware(ranks))
    check_engine_config(job.deepspeed, job.deepspeed_name)
    return job


def _measure(control: MemoryControl, stage: Stage, steps: int, snapshots: Path | None) -> tuple[MemoryRecord, float]:
    job, built = control.job, control.built
    built.stages.advance(stage.steps.start)
    control.entered(stage)
    passes = control.plan.batches[stage.index].accumulation
    batch = longest_batch(job, control.micro_batches[stage.index], control.ranks.device)

    def step() -> None:
        for _ in range(passes):
            loss = job.task.loss(built.engine, batch)
            built.engine.backward(loss)
            del loss  # with the graph, in which bitsandbytes' int8 layers keep their inputs even after backward
            built.engine.step()

    times = []
    with control.watching(stage):
        step()  # allocates optimizer state, records ZeRO-3's trace
        reset_peak()
        with _recording(snapshots, stage):
            peak = _peak_of(step)
            for _ in range(steps - 1):
                began = time.perf_counter()
                step()
                times.append(time.perf_counter() - began)
    return control.record(stage, peak), sorted(times)[len(times) // 2] if times else 0.0


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
