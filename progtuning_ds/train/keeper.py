"""Saves a run by the rules of its configuration, and finds where to go on. No deepspeed.runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progtuning_ds.checkpoint import Checkpoint, CheckpointStore, load_checkpoint, newest_sound, save_checkpoint
from progtuning_ds.checkpoint.agreement import on_first
from progtuning_ds.checkpoint.manifest import read_manifest
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

    def due(self, position: Position) -> bool:
        """Whether a checkpoint is to be made after the last step."""
        settings, job, done = self.job.config.checkpoint, self.job, position.done
        epoch = settings.every_epochs * job.order.steps_per_epoch
        return (
            (settings.every_steps is not None and done % settings.every_steps == 0)
            or (epoch > 0 and done % epoch == 0)
            or (settings.at_stage_end and done == job.plan.stage_at(done - 1).steps.stop)
        )

    def save(self, stages: StageEngine, position: Position) -> CheckpointRecord | None:
        """Save the run, then remove checkpoints that are no longer wanted. Collective.

        Returns:
            What it took; None if this very position is saved already.

        Raises:
            CheckpointError: on all ranks, in one line; earlier checkpoints are as they were.
        """
        if self._saved == position.done:
            return None
        began = time.perf_counter()
        scored = position.evaluated == position.done
        metric = position.metrics["validation"].get(self.job.task.main_metric) if scored else None
        program = {"position": position.to_dict(), **_identity(self.job)}
        path = save_checkpoint(stages, self.store, position.done, program=program, about={"metric": metric})
        self._saved = position.done
        on_first(lambda: self._rotate(position.done))
        size = on_first(lambda: sum(file.stat().st_size for file in path.iterdir()))
        return CheckpointRecord(position.done, path.name, size, time.perf_counter() - began)

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
    difference = first_difference(program["config"], now["config"])
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
    lengths = hashlib.sha256(json.dumps([int(length) for length in job.task.train.lengths]).encode()).hexdigest()[:16]
    return {
        "config": dataclasses.asdict(job.config),
        "rows": job.settings.global_batch_size,
        "data": f"{job.order.num_rows} rows of lengths {lengths}",
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
