"""A whole run: ranks, job, training, export and summary, once or beside full fine-tuning. No deepspeed.runtime."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from progtuning_ds.config import RunConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.train import run_dir
from progtuning_ds.train.dry_run import show_job
from progtuning_ds.train.engine_config import check_engine_config
from progtuning_ds.train.job import Job, prepare_job, without_freezing
from progtuning_ds.train.keeper import Keeper
from progtuning_ds.train.outcome import EXPECTED
from progtuning_ds.train.peers import PeerWatch
from progtuning_ds.train.ranks import Ranks, hardware, start_ranks
from progtuning_ds.train.run_dir import AUTO, NEVER
from progtuning_ds.train.seeds import print_seeds, run_seeds, seed_configs, write_seeds
from progtuning_ds.train.session import Session, describe, read_run
from progtuning_ds.train.signals import StopSignals
from progtuning_ds.train.summary import print_comparison


def run_program(config: RunConfig, *, compare: bool = False, overwrite: bool = False, resume: str = NEVER) -> None:
    """Fine-tune as configured; with `compare`, also without freezing, on the same budget. Called by every rank.

    Args:
        config: the run.
        compare: whether to train without freezing too.
        overwrite: whether a run in the same directory may be replaced.
        resume: `never`; `auto` to go on from the newest sound checkpoint in the run directory, if there is one; or the
            folder of a checkpoint or a run to go on from.

    Raises:
        ConfigError: one line on what is wrong, before any weight is loaded.
        CheckpointError: if there is no checkpoint to go on from, or none can be written.
        RunEndError: if a signal or the guard ended the run.
    """
    folder = Path(config.output_dir).expanduser()
    # Every rank looks before the process group exists, and the first one writes after: all see the same.
    run_dir.check_run_dir(folder, overwrite=overwrite, resume=resume)
    if resume == AUTO:
        run_dir.check_same_settings(folder, config)
    ranks = start_ranks()
    console = make_console(ranks)
    job = ranks.local_first(lambda: _prepare(config, ranks))
    jobs = [job]
    if compare:
        jobs.append(without_freezing(job, str(folder / run_dir.FULL)))
    with PeerWatch(ranks, EXPECTED), StopSignals(ranks, enabled=config.checkpoint.on_signal) as signals:
        for one in jobs:
            Session(one, ranks, console, signals).run(resume)
            resume = AUTO if resume != NEVER else NEVER
    if compare and ranks.is_first:
        _compare(console, [Path(one.config.output_dir).expanduser() for one in jobs])


def run_dry(config: RunConfig, *, resume: str = NEVER) -> None:
    """Check everything that can be checked without weights, fetch a batch and print the plan. Called by every rank.

    Args:
        config: the run.
        resume: as for `run_program`; says where the run would go on, after checking that checkpoint.

    Raises:
        ConfigError: one line on what is wrong.
        CheckpointError: if there is no checkpoint to go on from.
    """
    folder = Path(config.output_dir).expanduser()
    if resume != NEVER:
        run_dir.check_run_dir(folder, overwrite=False, resume=resume)
    if resume == AUTO:
        run_dir.check_same_settings(folder, config)
    ranks = start_ranks()
    console = make_console(ranks)
    job = ranks.local_first(lambda: _prepare(config, ranks))
    for line in describe(job):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if resume != NEVER:
        console.print(_where_to_go_on(job, folder, resume), highlight=False, markup=False, soft_wrap=True)
    show_job(job, ranks, console)


def _where_to_go_on(job: Job, folder: Path, resume: str) -> str:
    if resume == AUTO and run_dir.is_complete(folder):
        return f"--resume auto: the {job.kind} run in {folder} is complete"
    found, passed_over = Keeper(job, folder).find(resume)
    damaged = "".join(f"; {line}" for line in passed_over)
    if found is None:
        return f"--resume {resume}: nothing to go on from, the run would start{damaged}"
    return f"--resume {resume}: would go on from {found.folder}, after step {found.step}{damaged}"


def run_with_seeds(config: RunConfig, seeds: Sequence[int], *, overwrite: bool = False, resume: str = NEVER) -> None:
    """Fine-tune once per seed, each in a directory of its own, and print mean and spread. Called by every rank.

    Args:
        config: the run; `train.seed` is replaced.
        seeds: different numbers.
        overwrite: whether runs in the same directories may be replaced.
        resume: `never`, or `auto` to go on with every seed where it was.

    Raises:
        ConfigError: one line on what is wrong, before any weight is loaded.
        CheckpointError: if there is no checkpoint to go on from, or none can be written.
        RunEndError: if a signal ended the run; a seed that its guard ends does not end the others.
    """
    if resume not in (AUTO, NEVER):
        raise ConfigError(f"--resume must be auto or never with --seeds, got {resume!r}")
    configs = seed_configs(config, seeds)
    folders = [Path(one.output_dir).expanduser() for one in configs]
    for one, folder in zip(configs, folders, strict=True):
        run_dir.check_run_dir(folder, overwrite=overwrite, resume=resume)
        if resume == AUTO:
            run_dir.check_same_settings(folder, one)
    ranks = start_ranks()
    console = make_console(ranks)

    def train(one: RunConfig) -> Mapping[str, Mapping[str, float]]:
        job = ranks.local_first(lambda: _prepare(one, ranks))
        console.print(f"seed {one.train.seed}", style="bold")
        with PeerWatch(ranks, EXPECTED), StopSignals(ranks, enabled=one.checkpoint.on_signal) as signals:
            Session(job, ranks, console, signals).run(resume)
        metrics = read_run(Path(one.output_dir).expanduser())[0].metrics if ranks.is_first else None
        return ranks.gather(metrics)[0]

    results = run_seeds(configs, train)
    if ranks.is_first:
        print_seeds(console, results)
        write_seeds(folders[0].parent, results)


def _prepare(config: RunConfig, ranks: Ranks) -> Job:
    job = prepare_job(config, hardware(ranks))
    check_engine_config(job.deepspeed, job.deepspeed_name)
    return job


def make_console(ranks: Ranks) -> Console:
    """Speak on the first rank only; a log file is as wide as the tables, a terminal is what it is."""
    console = Console(quiet=not ranks.is_first)
    return console if console.is_terminal else Console(quiet=not ranks.is_first, width=120)


def _compare(console: Console, folders: Sequence[Path]) -> None:
    runs, stages = zip(*(read_run(folder) for folder in folders), strict=True)
    print_comparison(console, runs, stages)
    both = {run.kind: dataclasses.asdict(run) for run in runs}
    (folders[0] / run_dir.COMPARISON).write_text(json.dumps(both, indent=2) + "\n")
