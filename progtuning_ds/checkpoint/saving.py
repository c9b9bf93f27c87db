"""Saves a live stage engine on all ranks together: complete and checked, or not at all. No deepspeed.runtime."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from progtuning_ds import __version__
from progtuning_ds.checkpoint import agreement
from progtuning_ds.checkpoint.fragments import TENSORS, settled_file
from progtuning_ds.checkpoint.manifest import FileSeal, Manifest, json_bytes, write_bytes, write_manifest
from progtuning_ds.checkpoint.plain_values import encode
from progtuning_ds.checkpoint.sharing import TensorFile, link_or_write, with_twin
from progtuning_ds.checkpoint.snapshot import rank_state, shared_state
from progtuning_ds.checkpoint.store import CheckpointStore
from progtuning_ds.engine import StageEngine
from progtuning_ds.errors import CheckpointError

SHARED = "state.json"
_LIBRARIES = ("torch", "deepspeed", "transformers")


def rank_file(rank: int) -> str:
    """Name of a rank's description; its tensors are beside it, with the suffix `.safetensors`."""
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True)
class Draft:
    """A checkpoint of which the folder is there and this rank's content is known, but not yet in it.

    Attributes:
        store: where it goes.
        step: optimizer steps done.
        folder: its folder for the time being.
        files: this rank's tensors: first the file of what changes, then those of weights that are settled.
        description: this rank's JSON file.
        shared: the JSON file of what is the same on all ranks; written by the first.
        about: for the manifest.
    """

    store: CheckpointStore
    step: int
    folder: Path
    files: Sequence[TensorFile]
    description: bytes
    shared: bytes
    about: Mapping[str, Any]

    def write(self) -> dict[str, FileSeal]:
        """Write and sync this rank's files; returns their seals."""
        name = rank_file(agreement.rank())
        seals = {file.name: link_or_write(file, self.folder) for file in self.files}
        return {**seals, name: write_bytes(self.folder / name, self.description)}

    def detached(self) -> tuple[Draft, dict[str, FileSeal]]:
        """Return a draft that training cannot change, and the seals of what is written already.

        What changes from step to step is copied to host memory, settled weights are linked or written at once.
        """
        changing, *settled = self.files
        copied = {name: _host_copy(tensor) for name, tensor in changing.tensors.items()}
        seals = {file.name: link_or_write(file, self.folder) for file in settled}
        return replace(self, files=[replace(changing, tensors=copied)]), seals


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
    that. If anything fails nothing of it is left, and earlier checkpoints are as they were. Weights that no further
    step of the plan changes are hard links to an earlier checkpoint's file, if there is one of the same content.

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
    draft = begin_checkpoint(stages, store, step, program=program, about=about)
    return complete_checkpoint(draft, draft.write)


def begin_checkpoint(
    stages: StageEngine,
    store: CheckpointStore | str | Path,
    step: int,
    *,
    program: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Draft:
    """Do of `save_checkpoint` what comes before writing: take the state and make room. Collective."""
    store = store if isinstance(store, CheckpointStore) else CheckpointStore(Path(store))
    _check_boundary(stages)
    taken: list[tuple[list[TensorFile], bytes, bytes]] = []

    def take() -> int:
        """Take this rank's state and return the bytes it needs, which is all that other ranks must know."""
        taken.append(_take(stages, store, program or {}))
        return sum(file.to_write for file in taken[0][0])

    with _told(store, step):
        needed = sum(agreement.on_all(take))
        folder = agreement.on_first(lambda: _begin(store, step, needed))
    files, description, shared = taken[0]
    return Draft(store, step, folder, files, description, shared, {**_about(stages), **(about or {})})


def complete_checkpoint(draft: Draft, write: Callable[[], dict[str, FileSeal]]) -> Path:
    """Do of `save_checkpoint` what is left: let each rank write, then make the checkpoint visible. Collective.

    Args:
        draft: what `begin_checkpoint` returned.
        write: writes this rank's files, or waits until they are written.
    """
    with _told(draft.store, draft.step):
        try:
            seals: dict[str, FileSeal] = {}
            for share in agreement.on_all(write):
                seals |= share
            return agreement.on_first(lambda: _finish(draft, seals))
        except CheckpointError:
            if agreement.rank() == 0:
                draft.store.abandon(draft.folder)
            raise


def _take(
    stages: StageEngine, store: CheckpointStore, program: Mapping[str, Any]
) -> tuple[list[TensorFile], bytes, bytes]:
    state = rank_state(stages)
    tensors = Path(rank_file(agreement.rank())).with_suffix(TENSORS).name
    files = [TensorFile(tensors, state.tensors)]
    files += [with_twin(store, settled_file(tensors, stage), part) for stage, part in state.settled.items()]
    shared = {**shared_state(stages), "program": encode(dict(program), "program")} if agreement.rank() == 0 else {}
    return files, json_bytes(state.described), json_bytes(shared)


def _begin(store: CheckpointStore, step: int, needed: int) -> Path:
    temporary = store.begin(step)
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        store.abandon(temporary)
        raise CheckpointError(f"it takes {needed:,} bytes and {store.folder} has {free:,} left")
    return temporary


def _finish(draft: Draft, seals: dict[str, FileSeal]) -> Path:
    seals[SHARED] = write_bytes(draft.folder / SHARED, draft.shared)
    write_manifest(draft.folder, Manifest(draft.step, draft.about, seals))
    return draft.store.publish(draft.folder, draft.step)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


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


@contextmanager
def _told(store: CheckpointStore, step: int) -> Iterator[None]:
    """Say of an error which checkpoint it is about, and which one is left."""
    try:
        yield
    except CheckpointError as error:
        steps = store.steps()
        kept = f"the last complete one is {store.path(steps[0])}" if steps else "there is no earlier one"
        raise CheckpointError(f"the checkpoint of step {step} cannot be written: {error}; {kept}") from error
