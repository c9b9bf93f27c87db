"""Finds a sound checkpoint and loads it into a fresh stage engine. No deepspeed.runtime. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progtuning_ds.checkpoint import agreement
from progtuning_ds.checkpoint.manifest import Manifest, problem_with, read_manifest
from progtuning_ds.checkpoint.plain_values import decode
from progtuning_ds.checkpoint.restore import Saved, restore
from progtuning_ds.checkpoint.saving import SHARED, rank_file
from progtuning_ds.checkpoint.store import CheckpointStore
from progtuning_ds.engine import StageEngine
from progtuning_ds.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all found, and found to be what was written."""

    folder: Path
    manifest: Manifest
    shared: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was made."""
        return self.manifest.step

    @property
    def program(self) -> dict[str, Any]:
        """What the caller of `save_checkpoint` wanted back."""
        return decode(self.shared["program"])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. Collective: ranks share the reading.

    Raises:
        CheckpointError: on all ranks, one line that names the checkpoint, the file and what is wrong with it.
    """
    manifest = agreement.on_first(lambda: read_manifest(folder))

    def own_share() -> list[str]:
        names = sorted(manifest.files)[agreement.rank() :: agreement.world_size()]
        problems = (problem_with(folder, name, manifest.files[name]) for name in names)
        return [problem for problem in problems if problem]

    problems = [problem for share in agreement.on_all(own_share) for problem in share]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"checkpoint {folder} is damaged: {problems[0]}{more}")
    return Checkpoint(folder, manifest, _read(folder / SHARED))


def newest_sound(store: CheckpointStore) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and a line on each newer one that is not. Collective."""
    passed_over: list[str] = []
    for folder in agreement.on_first(store.candidates):
        try:
            return open_checkpoint(folder), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def load_checkpoint(stages: StageEngine, checkpoint: Checkpoint | str | Path) -> Checkpoint:
    """Bring a fresh engine to where a checkpoint was made, whatever number of ranks and ZeRO stage made it. Collective.

    On the same number of ranks and under the same ZeRO stage everything that follows is what it would have been, to
    the bit; else up to the order of sums.

    Args:
        stages: an engine built as for a start from the beginning, that has not trained yet.
        checkpoint: what `open_checkpoint` returned, or the folder of a checkpoint, or of several: then the
            newest sound one.

    Returns:
        The checkpoint; go on with its `step`.

    Raises:
        CheckpointError: one line that names the checkpoint and why it cannot be used: damaged, of another model, of
            another plan, of state that this optimizer cannot take over.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = _open(Path(checkpoint))
    restore(stages, _saved(checkpoint))
    return checkpoint


def _open(path: Path) -> Checkpoint:
    store = CheckpointStore(path)
    if not store.steps():
        return open_checkpoint(path)
    found, passed_over = newest_sound(store)
    if found is None:
        raise CheckpointError("; ".join(passed_over))
    return found


def _saved(checkpoint: Checkpoint) -> Saved:
    count = checkpoint.manifest.about["world_size"]
    names = [rank_file(rank) for rank in range(count)]
    return Saved(
        folder=checkpoint.folder,
        step=checkpoint.step,
        shared=checkpoint.shared,
        ranks=_all(checkpoint.folder, names),
        files=[Path(name).with_suffix(".safetensors").name for name in names],
    )


def _all(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    return [_read(folder / name) for name in names]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
