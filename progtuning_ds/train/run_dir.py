"""The run directory: never overwritten silently. Standard library only."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

from progtuning_ds.errors import ConfigError

CONFIG, DEEPSPEED, PLAN, PLOT = "config.yaml", "deepspeed.json", "plan.json", "training.png"
COMPARISON, FINAL, FULL = "comparison.json", "final", "full"
# Everything a run writes, and so all that overwriting one may remove.
_ARTIFACTS = (
    CONFIG,
    DEEPSPEED,
    PLAN,
    PLOT,
    FINAL,
    FULL,
    "steps.jsonl",
    "stages.jsonl",
    "evaluations.jsonl",
    "summary.json",
    COMPARISON,
)


def check_run_dir(folder: Path, *, overwrite: bool) -> None:
    """Raise a ConfigError if a directory holds a run that may not be replaced; changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir must be a directory, got the file {str(folder)!r}")
    if not overwrite and holds_run(folder):
        raise ConfigError(
            f"output_dir {str(folder)!r} already holds a run; give --overwrite, or output_dir={free_name(folder)}"
        )


def make_run_dir(folder: Path) -> None:
    """Create the directory and remove an earlier run's files; files of other origin stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARTIFACTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def holds_run(folder: Path) -> bool:
    """Whether a run has written to a directory."""
    return any((folder / name).exists() for name in _ARTIFACTS)


def free_name(folder: Path) -> Path:
    """Return the first of `run-2`, `run-3`, ... that holds nothing."""
    candidates = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in candidates if not path.exists())
