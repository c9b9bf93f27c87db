"""What may watch a run: the loop tells observers, and knows nothing of files or terminals. No deepspeed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from progtuning_ds.engine import StageTransition
from progtuning_ds.schedule import Stage
from progtuning_ds.train.job import Job
from progtuning_ds.train.records import (
    CheckpointRecord,
    EvaluationRecord,
    MemoryRecord,
    RecordLog,
    RunRecord,
    SessionRecord,
    StageRecord,
    StepRecord,
)


class Observer:
    """Base of all observers; every method does nothing. All calls of a run come in the order of the methods here."""

    def run_started(self, job: Job) -> None:
        """The engine is built and training begins."""

    def session_started(self, record: SessionRecord) -> None:
        """These processes begin to train, from the start or from a checkpoint."""

    def stage_started(self, stage: Stage, transition: StageTransition | None) -> None:
        """A stage begins; its transition, if it needed one, is done."""

    def steps_done(self, records: Sequence[StepRecord]) -> None:
        """Some optimizer steps are done; told in groups of up to `logging.steps`."""

    def evaluated(self, record: EvaluationRecord) -> None:
        """A split was evaluated."""

    def stage_finished(self, record: StageRecord) -> None:
        """A stage is over, evaluation included."""

    def memory_measured(self, record: MemoryRecord) -> None:
        """What the stage that is over held."""

    def saved(self, record: CheckpointRecord) -> None:
        """A checkpoint is complete."""

    def run_finished(self, record: RunRecord) -> None:
        """Training and evaluation are over and the model is saved."""

    def close(self) -> None:
        """The run is over, well or not."""


class Recorder(Observer):
    """Writes every record to the run directory."""

    def __init__(self, log: RecordLog) -> None:
        self._log = log

    def steps_done(self, records: Sequence[StepRecord]) -> None:
        """Append them to steps.jsonl."""
        for record in records:
            self._log.write(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Append it to evaluations.jsonl."""
        self._log.write(record)

    def stage_finished(self, record: StageRecord) -> None:
        """Append it to stages.jsonl."""
        self._log.write(record)

    def memory_measured(self, record: MemoryRecord) -> None:
        """Append it to memory.jsonl."""
        self._log.write(record)

    def session_started(self, record: SessionRecord) -> None:
        """Append it to sessions.jsonl."""
        self._log.write(record)

    def saved(self, record: CheckpointRecord) -> None:
        """Append it to checkpoints.jsonl."""
        self._log.write(record)

    def run_finished(self, record: RunRecord) -> None:
        """Write it to summary.json."""
        self._log.write(record)


class Observers(Observer):
    """Passes every call on to several observers, in order."""

    def __init__(self, members: Iterable[Observer]) -> None:
        self._members = tuple(members)

    def run_started(self, job: Job) -> None:
        """Pass on."""
        for member in self._members:
            member.run_started(job)

    def session_started(self, record: SessionRecord) -> None:
        """Pass on."""
        for member in self._members:
            member.session_started(record)

    def stage_started(self, stage: Stage, transition: StageTransition | None) -> None:
        """Pass on."""
        for member in self._members:
            member.stage_started(stage, transition)

    def steps_done(self, records: Sequence[StepRecord]) -> None:
        """Pass on."""
        for member in self._members:
            member.steps_done(records)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Pass on."""
        for member in self._members:
            member.evaluated(record)

    def stage_finished(self, record: StageRecord) -> None:
        """Pass on."""
        for member in self._members:
            member.stage_finished(record)

    def memory_measured(self, record: MemoryRecord) -> None:
        """Pass on."""
        for member in self._members:
            member.memory_measured(record)

    def saved(self, record: CheckpointRecord) -> None:
        """Pass on."""
        for member in self._members:
            member.saved(record)

    def run_finished(self, record: RunRecord) -> None:
        """Pass on."""
        for member in self._members:
            member.run_finished(record)

    def close(self) -> None:
        """Pass on."""
        for member in self._members:
            member.close()
