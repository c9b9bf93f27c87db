"""Tells DeepSpeed's monitors (TensorBoard, W&B, Comet, CSV) what a run is doing. No deepspeed.runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from progtuning_ds.train.observers import Observer
from progtuning_ds.train.records import EvaluationRecord, StageRecord, StepRecord

Event = tuple[str, float, int]


class Monitor(Protocol):
    """What DeepSpeed's `engine.monitor` is for this module (deepspeed/monitor/monitor.py)."""

    def write_events(self, event_list: list[Any]) -> None:
        """Write (name, value, x) of each event, on the first rank."""
        ...


class MonitorObserver(Observer):
    """Sends the figures of the records as events over the number of training rows seen, as DeepSpeed's own are.

    Names: `Train/loss`, `Train/lr`, `Train/grad_norm`, `Train/stage` (0-based), `Train/samples_per_second` and
    `Train/memory_bytes` for every step; `Eval/<metric>` of the validation rows and `Eval/<split>/<metric>` of other
    splits; `Stage/trainable_params`, `Stage/state_bytes_per_rank` and `Stage/transition_seconds` when a stage is over.

    Args:
        monitor: the engine's.
        rows_per_step: rows of an optimizer step over all ranks.
    """

    def __init__(self, monitor: Monitor, rows_per_step: int) -> None:
        self._monitor = monitor
        self._rows = rows_per_step

    def steps_done(self, records: Sequence[StepRecord]) -> None:
        """Send each step's figures."""
        events: list[Event] = []
        for record in records:
            values = {
                "loss": record.loss,
                "lr": record.learning_rate,
                "grad_norm": record.grad_norm,
                "stage": record.stage,
                "samples_per_second": record.samples_per_second,
                "memory_bytes": record.memory_bytes,
            }
            events += [
                (f"Train/{name}", value, (record.step + 1) * self._rows)
                for name, value in values.items()
                if value is not None
            ]
        self._monitor.write_events(events)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Send the scores of a split."""
        place = "Eval" if record.split == "validation" else f"Eval/{record.split}"
        at = (record.step + 1) * self._rows
        self._monitor.write_events([(f"{place}/{name}", value, at) for name, value in record.metrics.items()])

    def stage_finished(self, record: StageRecord) -> None:
        """Send what the stage trained and held."""
        values = {
            "trainable_params": record.trainable_params,
            "state_bytes_per_rank": max(record.state_bytes_per_rank),
            "transition_seconds": record.transition_seconds,
        }
        at = (record.first_step + record.steps) * self._rows
        self._monitor.write_events([(f"Stage/{name}", value, at) for name, value in values.items()])
