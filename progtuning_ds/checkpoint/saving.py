"""Saves a live stage engine on all ranks together: complete and checked, or not at all. No deepspeed.runtime."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from progtuning_ds import __version__
from progtuning_ds.checkpoint import agreement
from progtuning_ds.checkpoint.manifest import FileSeal, Manifest, write_json, write_manifest
from progtuning_ds.checkpoint.plain_values import encode
from progtuning_ds.checkpoint.snapshot import RankState, rank_state, shared_state
from progtuning_ds.checkpoint.store import CheckpointStore
from progtuning_ds.checkpoint.tensor_file import write_tensors
from progtuning_ds.engine import StageEngine
from progtuning_ds.errors import CheckpointError

SHARED = "state.json"
_LIBRARIES = ("torch", "deepspeed", "transformers")


def rank_file(rank: int) -> str:
    """Name of a rank's description; its tensors are beside it, with the suffix `.safetensors`."""
    return f"rank-{rank:05d}.json"


def save_checkpoint(
    stages: StageEngine,
    store: CheckpointStore | str | Path,
    step: int,
    *,
    program: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Save everything a run needs to go on after `step` optimizer steps. Collective.

    The checkpoint appears under its name only when every rank's files are on the disk, and `latest` names it after
    that. If anything fails nothing of it is left, and earlier checkpoints are as they were.

    Args:
        stages: the engine, at a gradient-accumulation boundary.
        store: the run's folder of checkpoints; all ranks must see the same one.
        step: optimizer steps done.
        program: what the caller wants back from `load_checkpoint`: plain values (numbers, texts, lists, mappings).
        about: plain JSON values for the manifest, such as metrics.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: on all ranks, in one line, if it cannot be written; the message names the last complete one.
    """
    store = store if isinstance(store, CheckpointStore) else CheckpointStore(Path(store))
    _check_boundary(stages)
    try:
        states: list[RankState] = []
        needed = sum(agreement.on_all(lambda: _describe(stages, states)))
        state = states[0]
        temporary = agreement.on_first(lambda: _begin(store, step, needed))
        try:
            seals: dict[str, FileSeal] = {}
            for share in agreement.on_all(lambda: _write_rank(temporary, state)):
                seals |= share
            meta = {**_about(stages), **(about or {})}
            return agreement.on_first(lambda: _finish(stages, store, temporary, step, seals, program or {}, meta))
        except CheckpointError:
            if agreement.rank() == 0:
                store.abandon(temporary)
            raise
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint of step {step} cannot be written: {error}; {_kept(store)}") from error


def _describe(stages: StageEngine, states: list[RankState]) -> int:
    """Take this rank's state and return its bytes, which is all that other ranks need to know."""
    states.append(rank_state(stages))
    return states[0].nbytes


def _begin(store: CheckpointStore, step: int, needed: int) -> Path:
    temporary = store.begin(step)
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        store.abandon(temporary)
        raise CheckpointError(f"it takes {needed:,} bytes and {store.folder} has {free:,} left")
    return temporary


def _write_rank(folder: Path, state: RankState) -> dict[str, FileSeal]:
    name = rank_file(agreement.rank())
    tensors = Path(name).with_suffix(".safetensors").name
    return {
        tensors: write_tensors(folder / tensors, state.tensors),
        name: write_json(folder / name, state.described),
    }


def _finish(
    stages: StageEngine,
    store: CheckpointStore,
    temporary: Path,
    step: int,
    seals: dict[str, FileSeal],
    program: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Path:
    shared = {**shared_state(stages), "program": encode(dict(program), "program")}
    seals[SHARED] = write_json(temporary / SHARED, shared)
    write_manifest(temporary, Manifest(step, about, seals))
    return store.publish(temporary, step)


def _about(stages: StageEngine) -> dict[str, Any]:
    return {
        "world_size": agreement.world_size(),
        "zero_stage": stages.engine.zero_optimization_stage(),
        "stage": stages.stage.index,
        "versions": {
            "progtuning_ds": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }


def _check_boundary(stages: StageEngine) -> None:
    engine = stages.engine
    inside = engine.micro_steps % engine.gradient_accumulation_steps()
    if inside or stages.adapter.holds_gradients():
        raise CheckpointError(
            "a checkpoint is made between optimizer steps, got a call "
            + (f"after micro-batch {inside}" if inside else "between backward() and step()")
        )


def _kept(store: CheckpointStore) -> str:
    steps = store.steps()
    return f"the last complete one is {store.path(steps[0])}" if steps else "there is no earlier one"
