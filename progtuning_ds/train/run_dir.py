"""The run directory: never overwritten silently. No torch, no deepspeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from progtuning_ds.config import RunConfig, load_run_config, save_run_config
from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.schedule import StagePlan

CONFIG, DEEPSPEED, PLAN, PLOT = "config.yaml", "deepspeed.json", "plan.json", "training.png"
COMPARISON, FINAL, FULL, CHECKPOINTS = "comparison.json", "final", "full", "checkpoints"
MERGED = "merged"
SUBMISSION = "submission"
FROZEN = "frozen"
SUMMARY = "summary.json"
AUTO, NEVER = "auto", "never"
"""What `--resume` may be beside a path."""

FREE = {
    "checkpoint",
    "data.num_workers",
    "deepspeed",
    "export",
    "guard",
    "logging",
    "memory",
    "optimizer",
    "output_dir",
    "train.eval_batch_size",
    "train.gradient_accumulation_steps",
    "train.micro_batch_size",
}
"""Settings that may differ between the parts of a run: where and how fast it computes, not what."""

# Everything a run writes, and so all that overwriting one may remove; the configuration last, so that a directory
# in which this was interrupted still says whose it is.
_ARTIFACTS = (
    DEEPSPEED,
    PLAN,
    PLOT,
    FINAL,
    f"{FINAL}.new",
    MERGED,
    SUBMISSION,
    FROZEN,
    FULL,
    "steps.jsonl",
    "stages.jsonl",
    "memory.jsonl",
    "shortage.json",
    "report.html",
    "report",
    "evaluations.jsonl",
    "checkpoints.jsonl",
    "sessions.jsonl",
    SUMMARY,
    COMPARISON,
    CHECKPOINTS,
    CONFIG,
)


def check_run_dir(folder: Path, *, overwrite: bool, resume: str = NEVER) -> None:
    """Raise a ConfigError if a directory holds a run that may be neither replaced nor continued; changes nothing."""
    if resume not in (AUTO, NEVER) and not Path(resume).expanduser().is_dir():
        raise ConfigError(
            f"--resume must be auto, never, or the folder of a checkpoint or a run, got {resume!r}, which is no "
            f"folder{did_you_mean(resume, (AUTO, NEVER))}"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir must be a directory, got the file {str(folder)!r}")
    if overwrite and resume != NEVER:
        raise ConfigError(f"--overwrite and --resume {resume} contradict each other; give one of them")
    continued = resume == AUTO or (resume != NEVER and _is_inside(Path(resume).expanduser(), folder))
    if not overwrite and not continued and holds_run(folder):
        raise ConfigError(
            f"output_dir {str(folder)!r} already holds a run; give --overwrite, or output_dir={free_name(folder)}, "
            f"or --resume auto to go on with it"
        )


def check_same_settings(folder: Path, config: RunConfig) -> None:
    """Raise a ConfigError if a directory holds a run with other settings, which this one would not go on with."""
    if not holds_run(folder):
        return
    if not (folder / CONFIG).exists():
        raise ConfigError(f"output_dir {str(folder)!r} holds no run that can go on: it has no {CONFIG}")
    theirs = asdict(load_run_config(folder / CONFIG))
    difference = first_difference(theirs, asdict(config))
    if difference is not None:
        raise ConfigError(different(difference, str(folder / CONFIG)))


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> tuple | None:
    """Return name, their value and ours of the first setting outside `FREE` that differs."""
    for key in (*ours, *(key for key in theirs if key not in ours)):
        name = f"{prefix}{key}"
        if name in FREE:
            continue
        their, our = theirs.get(key), ours.get(key)
        if isinstance(their, Mapping) and isinstance(our, Mapping):
            found = first_difference(their, our, f"{name}.")
            if found is not None:
                return found
        elif their != our:
            return name, their, our
    return None


def different(difference: tuple, where: str) -> str:
    """Say what `first_difference` found, in one line."""
    name, theirs, ours = difference
    return f"{name} is {ours!r} now and {theirs!r} in {where}; a run goes on with the settings it began with"


def make_run_dir(folder: Path, *, keep: bool = False) -> None:
    """Create the directory and, unless `keep`, remove an earlier run's files; files of other origin stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in () if keep else _ARTIFACTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if keep and not is_complete(folder):
        (folder / SUMMARY).unlink(missing_ok=True)  # half a line of a run that died at its very end


def write_inputs(folder: Path, config: RunConfig, deepspeed: Mapping[str, Any], plan: StagePlan) -> None:
    """Write what the run is: its configuration, the DeepSpeed JSON and the stages."""
    new = folder / f"{CONFIG}.new"
    save_run_config(config, new)
    new.replace(folder / CONFIG)
    (folder / DEEPSPEED).write_text(json.dumps(deepspeed, indent=2) + "\n")
    (folder / PLAN).write_text(json.dumps(plan.to_dict(), indent=2) + "\n")


def put_in_place(new: Path, final: Path) -> None:
    """Give a folder that is complete the name of another, which goes if it is there."""
    if final.exists():
        shutil.rmtree(final)
    new.rename(final)


def is_complete(folder: Path) -> bool:
    """Whether the run in a directory has ended well: its summary is the last thing a run writes."""
    try:
        return isinstance(json.loads((folder / SUMMARY).read_text(encoding="utf-8").splitlines()[-1]), dict)
    except (OSError, ValueError, IndexError):
        return False


def holds_run(folder: Path) -> bool:
    """Whether a run has written to a directory."""
    return any((folder / name).exists() for name in _ARTIFACTS)


def free_name(folder: Path) -> Path:
    """Return the first of `run-2`, `run-3`, ... that holds nothing."""
    candidates = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in candidates if not path.exists())


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
