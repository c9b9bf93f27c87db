"""The guard trips at the first step that is not as it should be, and at no other."""

from __future__ import annotations

import math
import random

import pytest

from progtuning_ds.config import GuardConfig
from progtuning_ds.train.guard import Guard, GuardError, WatchedStep
from progtuning_ds.train.records import StepRecord


def watched(step: int, loss: float, *, norm: float | None = 1.0, skipped: bool = False) -> WatchedStep:
    return WatchedStep(StepRecord(step, 0.0, 0, loss, 1e-4, norm, 1.0, 1.0, 0), skipped)


def trips(steps: list[WatchedStep], **settings: object) -> str | None:
    try:
        Guard(GuardConfig(**settings), "bf16").check(steps)
    except GuardError as error:
        return str(error)
    return None


def test_ordinary_training_passes() -> None:
    draw = random.Random(0)
    losses = [2.0 * math.exp(-step / 100) + draw.uniform(0, 1.5) for step in range(500)]
    assert trips([watched(step, loss) for step, loss in enumerate(losses)]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(bad: float) -> None:
    said = trips([watched(0, 0.7), watched(1, bad), watched(2, math.nan)])
    assert said == (
        f"the loss of step 2 is {bad}; look at the learning rate (1.00e-04 then), at the rows of that step, and at the "
        f"precision (bf16)"
    )


def test_a_gradient_norm_that_is_not_finite_is_named_unless_the_step_was_skipped() -> None:
    assert "the gradient norm of step 1 is inf" in str(trips([watched(0, 0.7, norm=math.inf)]))
    assert trips([watched(0, 0.7, norm=math.inf, skipped=True), watched(1, 0.7, norm=None)]) is None


def test_a_loss_that_climbs_and_stays_up_has_diverged() -> None:
    low, high = [watched(step, 0.5) for step in range(50)], [watched(50 + step, 6.0) for step in range(20)]
    said = trips(low + high, window=10)
    assert "the loss has diverged: 2.15 on average over 10 steps up to step 53, 0.5 at first" in str(said)
    assert trips([*low, *high[:2], *low], window=10) is None, "two bad steps are no divergence"
    assert trips(low + high, window=10, loss_factor=None) is None
    assert trips(low + high, window=10, action="off") is None


def test_overflow_after_overflow_is_told() -> None:
    skipped = [watched(step, 0.5, skipped=True) for step in range(6)]
    assert "overflowed in 6 steps in a row, up to step 6" in str(trips(skipped, max_overflows=5))
    assert trips([*skipped[:5], watched(5, 0.5), *skipped[:5]], max_overflows=5) is None


def test_a_resumed_guard_knows_what_it_had_seen() -> None:
    steps = [watched(step, 0.5) for step in range(30)] + [watched(30 + step, 9.0) for step in range(10)]
    settings = GuardConfig(window=10)
    for cut in (3, 25, 31):
        first, second = Guard(settings, "fp32"), Guard(settings, "fp32")
        first.check(steps[:cut])
        second.set_state(first.state())
        with pytest.raises(GuardError, match="up to step 32,"):
            second.check(steps[cut:])
