"""Where a run is: what the loop has to know to go on, and how records are taken back to it. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from progtuning_ds.train.records import FILES, EvaluationRecord, MemoryRecord, StageRecord, StepRecord


@dataclass
class StageTotals:
    """What has gone into the current stage so far; bytes and seconds of its transition as this rank saw them."""

    released_bytes: dict[str, int] = field(default_factory=dict)
    moved_bytes: int = 0
    transition_seconds: float = 0.0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Position:
    """The place of a run between two optimizer steps.

    Attributes:
        done: optimizer steps done.
        settled: whether what is due after the last of them (evaluation, the record of a stage) was done too.
        stage: totals of the stage of the last step.
        metrics: the last metrics of every split.
        evaluated: steps done at the last evaluation.
        seconds: wall-clock seconds of the run up to here, earlier processes included.
        rollbacks: how often the run went back.
        lr_scale: what the learning rate is multiplied by because of that.
        guard: what the guard has seen.
        best: the highest main metric at the end of an epoch so far.
        waited: epochs since then.
        ended: whether the run is over before its time (`train.early_stopping`).
        frozen: size and checksum of each file of exact weights of frozen blocks (`schedule.on_freeze`).
    """

    done: int = 0
    settled: bool = True
    stage: StageTotals = field(default_factory=StageTotals)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluated: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    lr_scale: float = 1.0
    guard: dict[str, Any] = field(default_factory=dict)
    best: float | None = None
    waited: int = 0
    ended: bool = False
    frozen: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` turns into an equal position."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Position:
        """Rebuild the position that `to_dict` wrote."""
        plain: dict[str, Any] = dict(values)
        plain["stage"] = StageTotals(**plain["stage"])
        return cls(**plain)


def rewind_records(folder: Path, position: Position) -> None:
    """Remove what a run recorded after a position, half a line at the end included; the run will record it again."""
    settled = position.done if position.settled else position.done - 1
    kept = {
        StepRecord: lambda record: record["step"] < position.done,
        EvaluationRecord: lambda record: record["step"] < settled,
        StageRecord: lambda record: record["first_step"] + record["steps"] <= settled,
        MemoryRecord: lambda record: record["step"] < settled,
    }
    for kind, keeps in kept.items():
        path = folder / FILES[kind]
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _keeps(line, keeps)]
            new = path.with_suffix(".new")
            new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            new.replace(path)


def _keeps(line: str, keeps: Any) -> bool:
    try:
        return keeps(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False
