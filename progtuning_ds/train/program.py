"""A whole run: ranks, job, training, export and summary, once or beside full fine-tuning. No deepspeed.runtime."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from progtuning_ds import __version__
from progtuning_ds.config import RunConfig, save_run_config
from progtuning_ds.train import run_dir
from progtuning_ds.train.assembly import build
from progtuning_ds.train.engine_config import check_engine_config
from progtuning_ds.train.export import save_final
from progtuning_ds.train.job import Job, prepare_job, without_freezing
from progtuning_ds.train.loop import TrainingLoop
from progtuning_ds.train.observers import Observer, Observers, Recorder
from progtuning_ds.train.plots import draw_training
from progtuning_ds.train.progress import make_progress
from progtuning_ds.train.ranks import Ranks, hardware, start_ranks
from progtuning_ds.train.records import RecordLog, RunRecord, StageRecord, read_records
from progtuning_ds.train.summary import print_comparison, print_summary


def run_program(config: RunConfig, *, compare: bool = False, overwrite: bool = False) -> None:
    """Fine-tune as configured; with `compare`, also without freezing, on the same budget. Called by every rank.

    Raises:
        ConfigError: one line on what is wrong, before any weight is loaded.
    """
    folder = Path(config.output_dir).expanduser()
    # Every rank looks before the process group exists, and the first one writes after: all see the same.
    run_dir.check_run_dir(folder, overwrite=overwrite)
    ranks = start_ranks()
    console = make_console(ranks)
    job = ranks.local_first(lambda: _prepare(config, ranks))
    jobs = [job]
    if compare:
        jobs.append(without_freezing(job, str(folder / run_dir.FULL)))
    if ranks.is_first:
        run_dir.make_run_dir(folder)
    for one in jobs:
        _run(one, ranks, console)
    if compare and ranks.is_first:
        _compare(console, [Path(one.config.output_dir).expanduser() for one in jobs])


def _prepare(config: RunConfig, ranks: Ranks) -> Job:
    job = prepare_job(config, hardware(ranks))
    check_engine_config(job.deepspeed, job.deepspeed_name)
    return job


def make_console(ranks: Ranks) -> Console:
    """Speak on the first rank only; a log file is as wide as the tables, a terminal is what it is."""
    console = Console(quiet=not ranks.is_first)
    return console if console.is_terminal else Console(quiet=not ranks.is_first, width=120)


def _run(job: Job, ranks: Ranks, console: Console) -> None:
    began = time.perf_counter()
    folder = Path(job.config.output_dir).expanduser()
    if ranks.is_first:
        _write_inputs(job, folder)
    for line in describe(job):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    built = build(job, ranks)
    console.print(_who_steps(built.stages.kernel, job.config.optimizer.kernel), highlight=False, markup=False)
    observer = _observer(job, ranks, console, folder)
    try:
        metrics = TrainingLoop(job, built, ranks, observer).run()
        save_final(built.module, job.tokenizer, folder / run_dir.FINAL, is_first=ranks.is_first)
        observer.run_finished(_run_record(job, ranks, metrics, time.perf_counter() - began))
    finally:
        observer.close()
    built.close()
    if ranks.is_first:
        _finish(job, console, folder)


def _observer(job: Job, ranks: Ranks, console: Console, folder: Path) -> Observer:
    if not ranks.is_first:
        return Observer()
    return Observers([Recorder(RecordLog(folder)), make_progress(job.config.logging.progress, console)])


def describe(job: Job) -> list[str]:
    """What is about to happen, for the user to check; one line each."""
    settings, plan = job.settings, job.plan
    return [
        f"{job.kind}: {job.shape.model_type} with {len(job.blocks)} blocks, {job.counts.total:,} parameters, "
        f"in {settings.precision}, ZeRO stage {job.zero_stage} on {settings.world_size} rank(s)",
        *job.task.notes,
        f"{plan.total_steps} steps in {len(plan.stages)} stage(s); {settings.global_batch_size} rows a step = "
        f"{settings.micro_batch_size} x {settings.gradient_accumulation_steps} accumulated x "
        f"{settings.world_size} rank(s); peak learning rate {settings.learning_rate:g}, "
        f"{job.warmup_steps} steps of warm-up",
    ]


def _who_steps(kernel: str, asked: str) -> str:
    who = {"deepspeed": "DeepSpeed's own", "triton": "fused, by Triton", "reference": "fused, in plain PyTorch"}
    return f"optimizer step: {who.get(kernel, 'fused, by PyTorch for CPUs')} (optimizer.kernel: {asked})"


def _write_inputs(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_run_config(job.config, folder / run_dir.CONFIG)
    (folder / run_dir.DEEPSPEED).write_text(json.dumps(job.deepspeed, indent=2) + "\n")
    (folder / run_dir.PLAN).write_text(json.dumps(job.plan.to_dict(), indent=2) + "\n")


def _run_record(job: Job, ranks: Ranks, metrics: dict[str, dict[str, float]], seconds: float) -> RunRecord:
    total = job.account
    libraries = ("torch", "deepspeed", "transformers", "datasets")
    return RunRecord(
        kind=job.kind,
        world_size=ranks.world_size,
        device=ranks.device.type,
        zero_stage=job.zero_stage,
        precision=job.settings.precision,
        total_steps=job.plan.total_steps,
        updated_params=total.updated_params,
        updated_params_full=total.updated_params_full,
        saving=total.saving,
        seconds=seconds,
        main_metric=job.task.main_metric,
        metrics=metrics,
        versions={
            "progtuning_ds": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
    )


def _finish(job: Job, console: Console, folder: Path) -> None:
    run, stages = _read(folder)
    print_summary(console, run, stages)
    if job.config.logging.plot:
        draw_training(folder, folder / run_dir.PLOT)
    console.print(f"model in {folder / run_dir.FINAL}, records in {folder}", highlight=False, soft_wrap=True)


def _compare(console: Console, folders: Sequence[Path]) -> None:
    runs, stages = zip(*(_read(folder) for folder in folders), strict=True)
    print_comparison(console, runs, stages)
    both = {run.kind: dataclasses.asdict(run) for run in runs}
    (folders[0] / run_dir.COMPARISON).write_text(json.dumps(both, indent=2) + "\n")


def _read(folder: Path) -> tuple[RunRecord, list[StageRecord]]:
    return read_records(folder, RunRecord)[-1], read_records(folder, StageRecord)
