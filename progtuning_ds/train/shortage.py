"""Knows that memory has run out, and remembers in the run directory what ran out of it. Imports torch only."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

SHORTAGE = "shortage.json"


@dataclass(frozen=True, slots=True)
class Shortage:
    """A setting that ran out of memory.

    Attributes:
        stage: index of the stage.
        micro_batch: rows per pass that were too many.
        instead: rows per pass to go on with, those of the first stage.
        world_size: ranks at that time.
        zero_stage: of the engine.
    """

    stage: int
    micro_batch: int
    instead: int
    world_size: int
    zero_stage: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the accelerator or in the process."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def remember(folder: Path, shortage: Shortage) -> None:
    """Write it to a run directory; any rank may, several at once too."""
    new = folder / f"{SHORTAGE}.{os.getpid()}"
    new.write_text(json.dumps(asdict(shortage)) + "\n", encoding="utf-8")
    new.replace(folder / SHORTAGE)


def remembered(folder: Path) -> Shortage | None:
    """What a run directory remembers, or None."""
    try:
        return Shortage(**json.loads((folder / SHORTAGE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
