"""Records of a run: what is written while it goes on, and read back for tables and plots. Standard library only.

Every record is a frozen dataclass and one line of JSON. Bytes are bytes, times are seconds, indices are 0-based.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step; loss is the mean over all its rows, or over their tokens where a task learns tokens."""

    step: int
    epoch: float
    stage: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    samples_per_second: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation after `step + 1` optimizer steps."""

    step: int
    epoch: float
    stage: int
    split: str
    reasons: tuple[str, ...]
    rows: int
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage, written when it is over; `transition_*`, `released_*` and `moved_*` tell how it began."""

    stage: int
    first_step: int
    steps: int
    trainable_blocks: tuple[int, ...]
    embeddings: bool
    trainable_params: int
    memory: dict[str, int]
    state_bytes_per_rank: tuple[int, ...]
    released_bytes: dict[str, int]
    moved_bytes: int
    transition_seconds: float
    seconds: float
    samples_per_second: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A whole run, written at its end. `updated_params` is the paper's measure (arXiv 2506.21119, section 4).

    Where blocks were quantized when they froze, `metrics` are of the model as it was trained, and `frozen_metrics` of
    it with either kind of frozen weights, `dequantized` and `exact`.
    """

    kind: str
    world_size: int
    device: str
    zero_stage: int
    precision: str
    total_steps: int
    updated_params: int
    updated_params_full: int
    saving: float
    seconds: float
    main_metric: str
    metrics: dict[str, dict[str, float]]
    versions: dict[str, str]
    frozen_metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint after `step` optimizer steps.

    `seconds` is how long training waited for it, `took` the time from its begin to its end, more if it was written
    in the background; of its `bytes`, `written` are in no earlier one.
    """

    step: int
    name: str
    bytes: int
    seconds: float
    written: int | None = None
    took: float | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A process group that began to train: after `step` steps, from `checkpoint` or the beginning.

    `reason` is `start`, `resume` or `rollback`; `message` says why it went back, or which checkpoints were damaged.
    """

    step: int
    reason: str
    checkpoint: str | None
    world_size: int
    zero_stage: int
    lr_scale: float
    message: str


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """What a stage held on a rank against what was predicted, in a run (at the stage's end) or a profile; bytes.

    Attributes:
        stage: its index.
        step: its last.
        micro_batch: rows per pass.
        accumulation: passes per step.
        predicted: by category at the predicted peak.
        predicted_host: what stays in host memory.
        predicted_peak: on the device.
        measured: states by category (``StageEngine.memory``).
        measured_peak: the allocator's on an accelerator; on the CPU the process's in a run, of tensors in a profile.
        fragmentation: taken by the allocator at its peak, and used by no tensor.
        host: the resident set of the process; on the CPU its peak.
        budget: of the device; None for no limit.
        reserve: of the budget, for what is no tensor.
        fell_back: the run went back to the first stage's rows per pass.
        seq_len: tokens of the longest row.
    """

    stage: int
    step: int
    micro_batch: int
    accumulation: int
    predicted: dict[str, int]
    predicted_host: dict[str, int]
    predicted_peak: int
    measured: dict[str, int]
    measured_peak: int
    fragmentation: int
    host: int
    budget: int | None
    reserve: int
    fell_back: bool
    seq_len: int = 0

    @property
    def deviation(self) -> float:
        """Predicted peak over measured peak, less one."""
        return self.predicted_peak / self.measured_peak - 1


FILES = {
    MemoryRecord: "memory.jsonl",
    StepRecord: "steps.jsonl",
    EvaluationRecord: "evaluations.jsonl",
    StageRecord: "stages.jsonl",
    RunRecord: "summary.json",
    CheckpointRecord: "checkpoints.jsonl",
    SessionRecord: "sessions.jsonl",
}


class RecordLog:
    """Appends records to the files of a run directory, each line complete as soon as it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, record: Any) -> None:
        """Append one record to the file of its kind."""
        line = json.dumps(dataclasses.asdict(record), ensure_ascii=False)
        with (self.folder / FILES[type(record)]).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_records(folder: Path, kind: type[Record]) -> list[Record]:
    """Read back all records of a kind; an absent file holds none."""
    path = folder / FILES[kind]
    if not path.exists():
        return []
    return [kind(**_tuples(json.loads(line), kind)) for line in path.read_text(encoding="utf-8").splitlines()]


def _tuples(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """JSON has no tuples; give them back to the fields that are declared as such."""
    declared = {field.name for field in dataclasses.fields(kind) if str(field.type).startswith("tuple")}
    return {key: tuple(value) if key in declared else value for key, value in values.items()}
