"""Files that earlier checkpoints of a run hold already: linked into the next one, not written again. No deepspeed.

Every checkpoint stays whole and can be removed on its own: a hard link is a second name of the same bytes, which go
with the last name. What is linked has the checksum of what would have been written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from progtuning_ds.checkpoint.manifest import FileSeal, read_manifest
from progtuning_ds.checkpoint.store import CheckpointStore
from progtuning_ds.checkpoint.tensor_file import file_size, seal_tensors, write_tensors
from progtuning_ds.errors import CheckpointError


@dataclass(frozen=True)
class TensorFile:
    """A file of a checkpoint to come.

    Attributes:
        name: within the checkpoint.
        tensors: what it is to hold.
        twin: a file that holds just that, with its seal, or None.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    twin: tuple[Path, FileSeal] | None = None

    @property
    def to_write(self) -> int:
        """Bytes that have to be written, if the twin can be linked."""
        return 0 if self.twin is not None else file_size(self.tensors)


def with_twin(store: CheckpointStore, name: str, tensors: Mapping[str, torch.Tensor]) -> TensorFile:
    """Look for a file of the same bytes among the store's checkpoints; only one of the same size costs a checksum."""
    size = file_size(tensors)
    known = {seal: path for seal, path in _files(store).items() if seal.size == size}
    seal = seal_tensors(tensors) if known else None
    return TensorFile(name, tensors, (known[seal], seal) if seal in known else None)


def link_or_write(file: TensorFile, folder: Path) -> FileSeal:
    """Put a file into a folder: as another name of its twin where the file system lets it, else as a new one.

    Raises:
        OSError: if it cannot be written.
    """
    target = folder / file.name
    if file.twin is not None:
        source, seal = file.twin
        try:
            os.link(source, target)
        except OSError:  # no links here, too many of them, or the twin is gone: what is to be written is at hand
            pass
        else:
            return seal
    return write_tensors(target, file.tensors)


def written_bytes(folder: Path) -> int:
    """Bytes of a new checkpoint that no earlier one has."""
    return sum(status.st_size for path in folder.iterdir() if (status := path.stat()).st_nlink == 1)


def _files(store: CheckpointStore) -> dict[FileSeal, Path]:
    """Every file of the store's checkpoints that has the size it should have, by its seal."""
    found: dict[FileSeal, Path] = {}
    for step in store.steps():
        folder = store.path(step)
        try:
            files = read_manifest(folder).files
        except CheckpointError:
            continue
        for name, seal in files.items():
            path = folder / name
            if path.is_file() and path.stat().st_size == seal.size:
                found.setdefault(seal, path)
    return found
