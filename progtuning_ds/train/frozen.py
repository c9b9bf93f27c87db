"""Blocks that are quantized when they freeze, in a run: their exact weights on disk, and both kinds of export.

No deepspeed.runtime.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from progtuning_ds.checkpoint.agreement import on_first
from progtuning_ds.checkpoint.manifest import FileSeal, problem_with
from progtuning_ds.checkpoint.tensor_file import write_tensors
from progtuning_ds.errors import CheckpointError
from progtuning_ds.train.assembly import Built
from progtuning_ds.train.evaluate import evaluate
from progtuning_ds.train.job import Job
from progtuning_ds.train.ranks import Ranks
from progtuning_ds.train.run_dir import FROZEN

EXPORTS = ("dequantized", "exact")
"""What a frozen block is in an export: what later stages saw, or what it was when it froze."""

Scores = dict[str, dict[str, dict[str, float]]]
"""Kind of export: split: metric."""


class FrozenWeights:
    """The exact weights of a run's frozen blocks, one checksummed file a block, written once.

    Args:
        folder: the run directory.
        seals: size and checksum by file name; part of the run's position, and kept up to date.
    """

    def __init__(self, folder: Path, seals: dict[str, Any]) -> None:
        self.folder = folder / FROZEN
        self.seals = seals

    def keep(self, block: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the weights of a block. Collective; the first rank writes.

        Raises:
            CheckpointError: on all ranks, if they cannot be written.
        """
        self.seals[_file(block)] = asdict(on_first(lambda: self._write(_file(block), weights)))

    def _write(self, name: str, weights: Mapping[str, torch.Tensor]) -> FileSeal:
        self.folder.mkdir(exist_ok=True)
        new = self.folder / f".new-{name}"
        new.unlink(missing_ok=True)
        try:
            seal = write_tensors(new, weights)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise CheckpointError(
                f"the exact weights of a block that freezes (schedule.on_freeze) cannot be written: "
                f"{error.strerror or error} ({self.folder / name})"
            ) from error
        new.replace(self.folder / name)
        return seal

    def read(self, block: int) -> dict[str, torch.Tensor]:
        """Return the weights of a block, on the CPU.

        Raises:
            CheckpointError: if the file is not what was written.
        """
        self._check(self.folder, _file(block))
        return load_file(self.folder / _file(block))

    def take_over(self, source: Path | None) -> None:
        """Make sure that all files are here, after a checkpoint was loaded. Collective.

        Args:
            source: directory of the run that the checkpoint is of, from which to copy what is missing.

        Raises:
            CheckpointError: on all ranks, one line on the first file that is missing or damaged.
        """
        on_first(lambda: self._take_over(source))

    def _take_over(self, source: Path | None) -> None:
        for name in sorted(self.seals):
            other = self.folder if source is None else source / FROZEN
            if other != self.folder and not (self.folder / name).exists():
                self._check(other, name)
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(other / name, self.folder / f".new-{name}")
                (self.folder / f".new-{name}").replace(self.folder / name)
            self._check(self.folder, name)

    def _check(self, folder: Path, name: str) -> None:
        problem = problem_with(folder, name, FileSeal(**self.seals[name]))
        if problem:
            raise CheckpointError(f"exact weights of frozen blocks in {folder}: {problem}")


def finish(job: Job, built: Built, ranks: Ranks, frozen: FrozenWeights, export: Callable[[], None]) -> Scores:
    """Export the trained model; where blocks were quantized, score it with either kind of frozen weights. Collective.

    Args:
        job: the run.
        built: its engine, trained to the end. Its blocks are dense afterwards.
        ranks: this process among the others.
        frozen: the exact weights.
        export: called once, while the engine holds what is to be exported.

    Returns:
        Metrics of every split for each of `EXPORTS`; nothing where no block was quantized.
    """
    compression = built.stages.compression
    if compression is None or not compression.blocks:
        export()
        return {}
    scores: Scores = {}
    compression.expand()
    for kind in EXPORTS:
        if kind == "exact":
            compression.put_back(frozen.read)
        scores[kind] = {
            name: evaluate(job.task, built.engine, rows, ranks, job.settings.eval_batch_size)[0]
            for name, rows in job.task.evaluations.items()
        }
        if kind == job.config.export.frozen:
            export()
    return scores


def _file(block: int) -> str:
    return f"block-{block:05d}.safetensors"
