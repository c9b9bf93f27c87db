"""Saves a run by the rules of its configuration, and finds where to go on. No deepspeed.runtime."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progtuning_ds.checkpoint import (
    BackgroundSave,
    Checkpoint,
    CheckpointStore,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
)
from progtuning_ds.checkpoint.agreement import on_first
from progtuning_ds.checkpoint.manifest import read_manifest
from progtuning_ds.checkpoint.sharing import written_bytes
from progtuning_ds.engine import StageEngine
from progtuning_ds.errors import CheckpointError, ConfigError
from progtuning_ds.train.job import Job
from progtuning_ds.train.position import Position
from progtuning_ds.train.records import CheckpointRecord
from progtuning_ds.train.run_dir import AUTO, CHECKPOINTS, different, first_difference


class Keeper:
    """The checkpoints of one run.

    Args:
        job: what is run.
        folder: its run directory.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.store = CheckpointStore(folder / CHECKPOINTS)
        self._saved: int | None = None
        self._under_way: BackgroundSave | None = None
        self._began = 0.0

    def due(self, position: Position) -> bool:
        """Whether a checkpoint is to be made after the last step."""
        settings, job, done = self.job.config.checkpoint, self.job, position.done
        epoch = settings.every_epochs * job.order.steps_per_epoch
        return (
            (settings.every_steps is not None and done % settings.every_steps == 0)
            or (epoch > 0 and done % epoch == 0)
            or (settings.at_stage_end and done == job.plan.stage_at(done - 1).steps.stop)
        )

    def save(self, stages: StageEngine, position: Position) -> list[CheckpointRecord]:
        """Save the run, then remove checkpoints that are no longer wanted. Collective.

        With `checkpoint.asynchronous` files are written while training goes on, and `collect` does the rest. A save
        that is still under way is finished first.

        Returns:
            What was completed, and what it took; nothing if this very position is saved already.

        Raises:
            CheckpointError: on all ranks, in one line; earlier checkpoints are as they were.
        """
        records = self.collect(wait=True)
        if self._saved == position.done:
            return records
        self._began = time.perf_counter()
        scored = position.evaluated == position.done
        metric = position.metrics["validation"].get(self.job.task.main_metric) if scored else None
        what: dict[str, Any] = {
            "program": {"position": position.to_dict(), **_identity(self.job)},
            "about": {"metric": metric},
        }
        if self.job.config.checkpoint.asynchronous:
            self._under_way = BackgroundSave(stages, self.store, position.done, **what)
        else:
            path = save_checkpoint(stages, self.store, position.done, **what)
            records.append(self._completed(position.done, path))
        self._saved = position.done
        return records

    def collect(self, *, wait: bool) -> list[CheckpointRecord]:
        """Complete a save that is under way: if its files are written, or else wait for them. Collective.

        Raises:
            CheckpointError: on all ranks, in one line, if they could not be written.
        """
        save = self._under_way
        if save is None or not (wait or save.is_written()):
            return []
        self._under_way = None
        path = save.finish()
        return [self._completed(save.step, path, save.stalled)]

    def _completed(self, step: int, path: Path, stalled: float | None = None) -> CheckpointRecord:
        # Before rotation, which may leave a shared file with one name.
        size, written = on_first(lambda: (sum(file.stat().st_size for file in path.iterdir()), written_bytes(path)))
        on_first(lambda: self._rotate(step))
        took = time.perf_counter() - self._began
        return CheckpointRecord(step, path.name, size, took if stalled is None else stalled, written, took)

    def find(self, source: str) -> tuple[Checkpoint | None, list[str]]:
        """Return what to go on from, and a line on every newer checkpoint that is damaged. Collective.

        Args:
            source: `auto` for the newest sound checkpoint of this run, else the folder of one, or of several.

        Raises:
            CheckpointError: if there are checkpoints and all are damaged, or the folder holds none.
            ConfigError: if the checkpoint is of a run with other settings.
        """
        store = self.store if source == AUTO else _store_of(Path(source).expanduser())
        found, passed_over = newest_sound(store)
        if found is None and (passed_over or source != AUTO):
            raise CheckpointError("; ".join(passed_over) or f"--resume: no checkpoint in {source!r}")
        if found is not None:
            check_same_run(found.program, self.job, str(found.folder))
        return found, passed_over

    def load(self, stages: StageEngine, checkpoint: Checkpoint) -> Position:
        """Bring a fresh engine to a checkpoint and return the place in the run. Collective."""
        load_checkpoint(stages, checkpoint)
        if checkpoint.folder.parent == self.store.folder:
            self._saved = checkpoint.step
        return Position.from_dict(checkpoint.program["position"])

    def _rotate(self, step: int) -> None:
        """Keep the newest and the best up to `step`; later ones are of a run that went back, and stay."""
        settings = self.job.config.checkpoint
        steps = self.store.steps()
        past = [other for other in steps if other <= step]
        scores = {other: score for other in past if (score := self._metric(other)) is not None}
        best = sorted(scores, key=lambda other: (scores[other], other), reverse=True)[: settings.keep_best]
        self.store.remove_all_but({*past[: settings.keep_last], *best, *(other for other in steps if other > step)})

    def _metric(self, step: int) -> float | None:
        try:
            return read_manifest(self.store.path(step)).about.get("metric")
        except CheckpointError:
            return None


def check_same_run(program: Mapping[str, Any], job: Job, name: str) -> None:
    """Raise unless a checkpoint's run computes what this one does.

    Raises:
        ConfigError: one line with the first setting that differs and both its values.
    """
    now = _identity(job)
    for part in ("config", "numbers"):
        difference = first_difference(program[part], now[part])
        if difference is not None:
            raise ConfigError(different(difference, name))
    if program["rows"] != now["rows"]:
        raise ConfigError(
            f"an optimizer step has {now['rows']} rows now and {program['rows']} in {name}; "
            f"set train.global_batch_size={program['rows']}"
        )
    if program["data"] != now["data"]:
        raise ConfigError(f"the training data is {now['data']} now and {program['data']} in {name}")


def _identity(job: Job) -> dict[str, Any]:
    """What makes two runs the same: settings, rows of a step, and the training data."""
    settings = job.settings
    return {
        "config": dataclasses.asdict(job.config),
        "numbers": {  # which the DeepSpeed JSON may have given, and that is free to change
            "precision": settings.precision,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "betas": settings.betas,
            "epsilon": settings.epsilon,
            "max_grad_norm": settings.max_grad_norm,
            "warmup_steps": job.warmup_steps,
            "lr_scheduler_type": settings.lr_scheduler_type,
        },
        "rows": settings.global_batch_size,
        "data": job.data_identity,
    }


def _store_of(path: Path) -> CheckpointStore:
    """The checkpoints that a path means: a run directory's, a folder of them, or a single one."""
    for folder in (path / CHECKPOINTS, path):
        if CheckpointStore(folder).steps():
            return CheckpointStore(folder)
    return _Single(path)


class _Single(CheckpointStore):
    """One checkpoint, wherever it is and whatever it is called."""

    def candidates(self) -> list[Path]:
        """Return it."""
        return [self.folder]
