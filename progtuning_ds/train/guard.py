"""Notices that training has gone wrong, from numbers that are the same on all ranks. No torch, no deepspeed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from progtuning_ds.config import GuardConfig
from progtuning_ds.train.records import StepRecord


class GuardError(Exception):
    """Training has gone wrong; the message says at which step, how, and what to look at."""


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """An optimizer step as the guard sees it; `skipped` if its gradients overflowed in fp16."""

    record: StepRecord
    skipped: bool


class Guard:
    """Looks at every step once, in order.

    Args:
        settings: what counts as gone wrong.
        precision: `fp32`, `bf16` or `fp16`, for the message.
    """

    def __init__(self, settings: GuardConfig, precision: str) -> None:
        self._settings = settings
        self._precision = precision
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=settings.window)
        self._overflows = 0

    def check(self, steps: Sequence[WatchedStep]) -> None:
        """Raise `GuardError` at the first step that is not as it should be."""
        if self._settings.action == "off":
            return
        for step in steps:
            self._check_finite(step)
            self._check_overflow(step)
            self._check_divergence(step.record)

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"first": list(self._first), "recent": list(self._recent), "overflows": self._overflows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._first = list(state["first"])[: self._settings.window]
        self._recent.extend(state["recent"])
        self._overflows = state["overflows"]

    def _check_finite(self, step: WatchedStep) -> None:
        record = step.record
        norm = record.grad_norm
        if not math.isfinite(record.loss):
            self._trip(record, f"the loss of step {record.step + 1} is {record.loss}", "the rows of that step")
        if not step.skipped and norm is not None and not math.isfinite(norm):
            self._trip(record, f"the gradient norm of step {record.step + 1} is {norm}", "the rows of that step")

    def _check_overflow(self, step: WatchedStep) -> None:
        self._overflows = self._overflows + 1 if step.skipped else 0
        if self._overflows > self._settings.max_overflows:
            self._trip(
                step.record,
                f"fp16 gradients overflowed in {self._overflows} steps in a row, up to step {step.record.step + 1}",
                "bf16 or fp32 as train.precision",
            )

    def _check_divergence(self, record: StepRecord) -> None:
        window, factor = self._settings.window, self._settings.loss_factor
        if len(self._first) < window:
            self._first.append(record.loss)
        self._recent.append(record.loss)
        if factor is None or len(self._first) < window or len(self._recent) < window:
            return
        before, now = sum(self._first) / window, sum(self._recent) / window
        if now > factor * before:
            self._trip(
                record,
                f"the loss has diverged: {now:.4g} on average over {window} steps up to step {record.step + 1}, "
                f"{before:.4g} at first",
                "train.warmup_ratio and train.max_grad_norm",
            )

    def _trip(self, record: StepRecord, what: str, where: str) -> None:
        raise GuardError(
            f"{what}; look at the learning rate ({record.learning_rate:.2e} then), at {where}, and at the precision "
            f"({self._precision})"
        )
