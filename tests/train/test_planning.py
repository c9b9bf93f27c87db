"""The schedule section becomes the plan it describes."""

from __future__ import annotations

from typing import Any

import pytest

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import StagePlan
from progtuning_ds.train.planning import make_plan


def planned(num_blocks: int = 6, epochs: int = 3, **schedule: Any) -> StagePlan:
    section = run_config({"schedule": schedule}).schedule
    return make_plan(section, num_blocks, epochs=epochs, steps_per_epoch=10)


def trains(plan: StagePlan) -> list[tuple[tuple[int, ...], int, bool]]:
    return [(stage.trainable_blocks, len(stage.steps), stage.embeddings) for stage in plan.stages]


def test_by_default_each_epoch_is_a_stage() -> None:
    assert trains(planned()) == [((0, 1, 2, 3, 4, 5), 10, True), ((2, 3, 4, 5), 10, True), ((4, 5), 10, True)]


def test_disabled_is_one_stage_that_trains_everything() -> None:
    assert trains(planned(enabled=False, num_stages=2)) == [((0, 1, 2, 3, 4, 5), 30, True)]


def test_stages_are_independent_of_epochs() -> None:
    assert trains(planned(num_stages=2, embeddings="first_stage")) == [
        ((0, 1, 2, 3, 4, 5), 15, True),
        ((3, 4, 5), 15, False),
    ]


@pytest.mark.parametrize(
    ("unit", "lengths"), [("epochs", [2, 0.5, 0.5]), ("steps", [20, 5, 5]), ("fractions", [4 / 6, 1 / 6, 1 / 6])]
)
def test_lengths_may_be_uneven_and_say_how_many_stages(unit: str, lengths: list[float]) -> None:
    plan = planned(stage_lengths=lengths, length_unit=unit)
    assert [len(stage.steps) for stage in plan.stages] == [20, 5, 5]


def test_stages_written_out_are_taken_as_they_are() -> None:
    stages = [{"blocks": "all", "steps": 10}, {"blocks": [0, 5], "steps": 20, "embeddings": False}]
    assert trains(planned(stages=stages)) == [((0, 1, 2, 3, 4, 5), 10, True), ((0, 5), 20, False)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 9}, ("num_stages must be at most", "9 stages for 6 blocks", "there is one per epoch")),
        ({"num_stages": 7}, ("at most",)),
        ({"stages": [{"blocks": "all", "steps": 29}]}, ("add up to the 30 steps of the run, got 29",)),
        ({"stage_lengths": [1, 1], "length_unit": "steps"}, ("30",)),
        ({"stages": [{"block": "all", "steps": 30}]}, ("did you mean 'blocks'?",)),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(**settings)
    said = str(caught.value)
    assert said.startswith("schedule: ")
    assert "\n" not in said
    for word in words:
        assert word in said
