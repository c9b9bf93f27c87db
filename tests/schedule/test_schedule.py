"""The paper's schedule, custom plans, and what is refused with which words."""

from collections.abc import Callable
from typing import Any

import pytest

from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import Part, Stage, StagePlan, custom_plan, partition_blocks, plan_stages


def test_the_remainder_goes_to_the_top_part() -> None:
    assert [list(part.blocks) for part in partition_blocks(8, 3)] == [[0, 1], [2, 3], [4, 5, 6, 7]]


def test_stages_of_the_paper_shrink_from_below() -> None:
    plan = plan_stages(num_blocks=12, num_stages=3, total_steps=90)
    assert [stage.trainable_blocks for stage in plan.stages] == [
        tuple(range(12)),
        tuple(range(4, 12)),
        tuple(range(8, 12)),
    ]
    assert [stage.steps for stage in plan.stages] == [range(30), range(30, 60), range(60, 90)]
    assert plan.boundaries == (30, 60)
    assert plan.total_steps == 90
    assert plan.is_shrinking


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        ("always", [True, True, True]),
        ("first_stage", [True, False, False]),
        ("never", [False, False, False]),
    ],
)
def test_embeddings_train_as_asked(embeddings: str, expected: list[bool]) -> None:
    plan = plan_stages(12, 3, 90, embeddings)
    assert [stage.embeddings for stage in plan.stages] == expected
    assert plan.is_shrinking


@pytest.mark.parametrize(
    ("lengths", "unit", "expected"),
    [
        ([10, 20, 60], "steps", (10, 30)),
        ([1, 0.5, 1.5], "epochs", (30, 45)),
        ([0.5, 0.25, 0.25], "fractions", (45, 68)),  # 67.5 rounds to the even step
        ([0.333, 0.333, 0.333], "fractions", (30, 60)),
    ],
)
def test_stage_lengths_in_every_unit(lengths: list[float], unit: str, expected: tuple[int, ...]) -> None:
    plan = plan_stages(12, 3, 90, lengths=lengths, length_unit=unit, steps_per_epoch=30)
    assert plan.boundaries == expected
    assert plan.total_steps == 90


def test_an_epoch_that_does_not_end_on_a_step_is_rounded() -> None:
    plan = plan_stages(4, 2, 11, lengths=[0.75, 0.75], length_unit="epochs", steps_per_epoch=7)  # 10.5 steps
    assert plan.total_steps == 11
    assert plan.boundaries == (6,)


def test_custom_sets_may_grow_and_rotate() -> None:
    plan = custom_plan(
        6,
        [
            {"blocks": "4-5", "steps": 5, "embeddings": False},
            {"blocks": [0, 1], "steps": 3},
            {"blocks": "0,2-5", "steps": 2},
            {"blocks": "all", "steps": 1},
            {"blocks": "none", "steps": 1, "embeddings": False},
        ],
        always_train=["head.*"],
    )
    assert [stage.trainable_blocks for stage in plan.stages] == [
        (4, 5),
        (0, 1),
        (0, 2, 3, 4, 5),
        (0, 1, 2, 3, 4, 5),
        (),
    ]
    assert [part.blocks for part in plan.parts] == [range(1), range(1, 2), range(2, 4), range(4, 6)]
    assert [stage.embeddings for stage in plan.stages] == [False, True, True, True, False]
    assert plan.boundaries == (5, 8, 10, 11)
    assert plan.always_train == ("head.*",)
    assert not plan.is_shrinking


def test_a_custom_plan_written_as_the_paper_does_is_the_papers_plan() -> None:
    paper = plan_stages(12, 3, 90, "first_stage")
    written = custom_plan(
        12,
        [
            {"blocks": "0-11", "steps": 30},
            {"blocks": "4-11", "steps": 30, "embeddings": False},
            {"blocks": "8-11", "steps": 30, "embeddings": False},
        ],
    )
    assert written == paper


def test_returning_embeddings_do_not_shrink() -> None:
    stages = [{"blocks": "all", "steps": 1, "embeddings": False}, {"blocks": "all", "steps": 1, "embeddings": True}]
    assert not custom_plan(2, stages).is_shrinking


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: plan_stages(12, 13, 90), "num_stages must be at most the number of blocks, got 13 stages for 12 blocks"),
    (lambda: partition_blocks(2, 3), "got 3 stages for 2 blocks"),
    (lambda: plan_stages(12, 0, 90), "num_stages must be a positive whole number, got 0"),
    (lambda: plan_stages(0, 1, 90), "num_blocks must be a positive whole number, got 0"),
    (lambda: plan_stages(12, 3, 2), "total_steps must be at least num_stages, got 2 steps for 3 stages"),
    (lambda: plan_stages(12, 3, 90.0), "total_steps must be a positive whole number, got 90.0"),  # type: ignore[arg-type]
    (lambda: plan_stages(12, 3, 90, "first"), "embeddings must be one of always, first_stage, never, got 'first'"),
    (lambda: plan_stages(12, 3, 90, "allways"), "did you mean 'always'?"),
    (lambda: plan_stages(12, 3, 90, lengths=[45, 45]), "lengths must hold one length for each of the 3 stages, got 2"),
    (lambda: plan_stages(12, 3, 90, lengths=[1, 2, 3]), "lengths must add up to 90 steps, got 1 + 2 + 3 = 6"),
    (lambda: plan_stages(12, 3, 90, lengths=[0, 45, 45]), "lengths[0] must be a positive number of steps, got 0"),
    (lambda: plan_stages(12, 3, 90, lengths=[1.5, 43.5, 45]), "lengths[0] must be a whole number of steps, got 1.5"),
    (lambda: plan_stages(12, 2, 90, lengths=[1, 1], length_unit="epochs"), "steps_per_epoch"),
    (
        lambda: plan_stages(12, 2, 90, lengths=[1, 1], length_unit="epochs", steps_per_epoch=30),
        "lengths must add up to 3 epochs, got 1 + 1 = 2",
    ),
    (
        lambda: plan_stages(12, 2, 90, lengths=[0.5, 0.6], length_unit="fractions"),
        "lengths must add up to 1, got 0.5 + 0.6 = 1.1",
    ),
    (
        lambda: plan_stages(12, 2, 90, lengths=[0.999, 0.001], length_unit="fractions"),
        "lengths[1] must give stage 1 at least one step, got 0.001 fractions",
    ),
    (lambda: plan_stages(12, 2, 90, lengths=[1, 1], length_unit="epoch"), "did you mean 'epochs'?"),
    (lambda: plan_stages(12, 3, 90, always_train="*norm*"), "always_train must be a sequence"),
    (lambda: plan_stages(12, 3, 90).stage_at(90), "step must be within 0..89 (the plan's steps), got 90"),
    (lambda: plan_stages(12, 3, 90).stage_at(-1), "got -1"),
    (lambda: custom_plan(12, []), "stages must be a non-empty list of mappings"),
    (lambda: custom_plan(12, [{"blocks": "0-3"}]), "stages[0].steps is missing"),
    (lambda: custom_plan(12, [{"steps": 3}]), "stages[0].blocks is missing"),
    (lambda: custom_plan(12, [{"block": "0-3", "steps": 1}]), "stages[0] has the unknown key 'block'"),
    (lambda: custom_plan(12, [{"block": "0-3", "steps": 1}]), "did you mean 'blocks'?"),
    (lambda: custom_plan(12, [{"blocks": "0-12", "steps": 1}]), "stages[0].blocks must hold blocks within 0..11"),
    (lambda: custom_plan(12, [{"blocks": [12], "steps": 1}]), "got 12"),
    (lambda: custom_plan(12, [{"blocks": "3-1", "steps": 1}]), "stages[0].blocks must be like '4-11'"),
    (lambda: custom_plan(12, [{"blocks": "top", "steps": 1}]), "got 'top'"),
    (lambda: custom_plan(12, [{"blocks": "1,1", "steps": 1}]), "must name every block once"),
    (lambda: custom_plan(12, [{"blocks": 3, "steps": 1}]), "stages[0].blocks must be a list of block indices"),
    (lambda: custom_plan(12, [{"blocks": "all", "steps": 0}]), "stages[0].steps must be a positive whole number"),
    (lambda: custom_plan(2, [{"blocks": "all", "steps": 1, "embeddings": "no"}]), "stages[0].embeddings must be true"),
    (lambda: custom_plan(2, ["0-1"]), "stages[0] must be a mapping"),  # type: ignore[list-item]
    (lambda: StagePlan.from_dict({"num_blocks": 2}), "plan must be a mapping as StagePlan.to_dict writes it"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_input_gets_one_line_that_names_the_field(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


PARTS = (Part(0, range(2)), Part(1, range(2, 4)))
FIRST = Stage(0, (0, 1, 2, 3), range(3), True)

INVALID: list[tuple[tuple[Part, ...], tuple[Stage, ...], str]] = [
    ((Part(0, range(2)),), (FIRST,), "parts must cover the 4 blocks"),
    ((Part(0, range(2)), Part(1, range(1, 4))), (FIRST,), "parts[1] must be Part(1, range(2, ...))"),
    ((Part(0, range(2)), Part(1, range(2, 2)), Part(2, range(2, 4))), (FIRST,), "parts[1]"),
    ((Part(0, range(2)), Part(5, range(2, 4))), (FIRST,), "parts[1]"),
    (PARTS, (), "stages must hold at least one stage"),
    (PARTS, (FIRST, Stage(1, (), range(4, 6), True)), "stages[1].steps must start at 3"),
    (PARTS, (FIRST, Stage(1, (), range(2, 6), True)), "stages[1].steps must start at 3"),
    (PARTS, (Stage(0, (), range(0), True),), "stages[0].steps must start at 0 and hold at least one step"),
    (PARTS, (Stage(1, (), range(3), True),), "stages[0].index must be 0"),
    (PARTS, (Stage(0, (4, 5), range(3), True),), "stages[0].trainable_blocks must be sorted"),
    (PARTS, (Stage(0, (1, 0), range(3), True),), "stages[0].trainable_blocks must be sorted"),
    (PARTS, (Stage(0, (0, 2, 3), range(3), True),), "must hold part 0 (range(0, 2)) wholly or not at all"),
]


@pytest.mark.parametrize(("parts", "stages", "words"), INVALID)
def test_a_plan_checks_itself(parts: tuple[Part, ...], stages: tuple[Stage, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StagePlan(4, parts, stages)
    assert words in str(caught.value)
