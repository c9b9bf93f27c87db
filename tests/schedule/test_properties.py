"""What holds for every schedule, whatever its numbers."""

import json
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning_ds.accounting import ComponentCounts, account
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import EMBEDDINGS, StagePlan, custom_plan, partition_blocks, plan_stages

always_the_same = settings(derandomize=True, deadline=None, max_examples=150)

counts_of_elements = st.integers(0, 10**9)


@st.composite
def paper_plans(draw: st.DrawFn) -> StagePlan:
    blocks = draw(st.integers(1, 48))
    stages = draw(st.one_of(st.integers(1, blocks), st.just(blocks)))
    steps = draw(st.one_of(st.integers(stages, stages + 3), st.integers(stages, 400)))
    return plan_stages(blocks, stages, steps, draw(st.sampled_from(EMBEDDINGS)))


@st.composite
def custom_stages(draw: st.DrawFn) -> tuple[int, list[dict[str, Any]]]:
    blocks = draw(st.integers(1, 10))
    stage = st.fixed_dictionaries(
        {
            "blocks": st.lists(st.integers(0, blocks - 1), unique=True),
            "steps": st.integers(1, 9),
            "embeddings": st.booleans(),
        }
    )
    return blocks, draw(st.lists(stage, min_size=1, max_size=5))


@st.composite
def counts_for(draw: st.DrawFn, plan: StagePlan) -> ComponentCounts:
    blocks = draw(st.lists(counts_of_elements, min_size=plan.num_blocks, max_size=plan.num_blocks))
    return ComponentCounts(draw(counts_of_elements), tuple(blocks), draw(counts_of_elements))


@always_the_same
@given(st.integers(1, 64), st.integers(1, 64))
def test_parts_hold_every_block_once_and_the_top_one_takes_the_remainder(blocks: int, parts: int) -> None:
    if parts > blocks:
        with pytest.raises(ConfigError, match=f"got {parts} stages for {blocks} blocks"):
            partition_blocks(blocks, parts)
        return
    found = partition_blocks(blocks, parts)
    assert [block for part in found for block in part.blocks] == list(range(blocks))
    assert [part.index for part in found] == list(range(parts))
    assert [len(part.blocks) for part in found[:-1]] == [blocks // parts] * (parts - 1)
    assert len(found[-1].blocks) == blocks // parts + blocks % parts


@always_the_same
@given(paper_plans())
def test_every_stage_drops_exactly_the_part_below_it(plan: StagePlan) -> None:
    assert plan.is_shrinking
    assert len(plan.parts) == len(plan.stages)
    assert plan.stages[0].trainable_blocks == tuple(range(plan.num_blocks))
    for part, (stage, following) in zip(plan.parts[:-1], pairwise(plan.stages), strict=True):
        assert set(stage.trainable_blocks) - set(following.trainable_blocks) == set(part.blocks)
    assert set(plan.stages[-1].trainable_blocks) == set(plan.parts[-1].blocks)


@always_the_same
@given(paper_plans())
def test_every_step_belongs_to_the_one_stage_that_holds_it(plan: StagePlan) -> None:
    owners = [[stage for stage in plan.stages if step in stage.steps] for step in range(plan.total_steps)]
    assert all(owner == [plan.stage_at(step)] for step, owner in enumerate(owners))
    assert plan.boundaries == tuple(
        step for step in range(1, plan.total_steps) if plan.stage_at(step) is not plan.stage_at(step - 1)
    )


@always_the_same
@given(paper_plans())
def test_equal_stages_end_at_the_nearest_step(plan: StagePlan) -> None:
    stages = len(plan.stages)
    for index, boundary in enumerate(plan.boundaries, start=1):
        assert abs(boundary - Fraction(plan.total_steps * index, stages)) <= Fraction(1, 2)
        assert boundary == round(plan.total_steps * index / stages)


@always_the_same
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.sampled_from(EMBEDDINGS))
def test_lengths_in_steps_are_kept_exactly(lengths: list[int], embeddings: str) -> None:
    plan = plan_stages(12, len(lengths), sum(lengths), embeddings, lengths=lengths)
    assert [len(stage.steps) for stage in plan.stages] == lengths


@always_the_same
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 30))
def test_lengths_in_whole_epochs_are_kept_exactly(lengths: list[int], steps_per_epoch: int) -> None:
    total = sum(lengths) * steps_per_epoch
    plan = plan_stages(8, len(lengths), total, lengths=lengths, length_unit="epochs", steps_per_epoch=steps_per_epoch)
    assert [len(stage.steps) for stage in plan.stages] == [length * steps_per_epoch for length in lengths]


@always_the_same
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(1, 1000))
def test_fractions_end_at_the_nearest_step_or_name_the_stage_without_one(weights: list[int], total: int) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    exact = [Fraction(sum(weights[: index + 1]) * total, sum(weights)) for index in range(len(weights))]
    try:
        plan = plan_stages(8, len(weights), total, lengths=fractions, length_unit="fractions")
    except ConfigError:
        assert total < len(weights) or min(weights) * total < 2 * sum(weights)
        return
    assert plan.total_steps == total
    for stage, end in zip(plan.stages, exact, strict=True):
        assert abs(stage.steps.stop - end) <= Fraction(1, 2) + Fraction(1, 10**6)


@always_the_same
@given(custom_stages())
def test_custom_plans_train_what_was_written_in_maximal_parts(case: tuple[int, list[dict[str, Any]]]) -> None:
    blocks, written = case
    plan = custom_plan(blocks, written)
    for stage, entry in zip(plan.stages, written, strict=True):
        assert set(stage.trainable_blocks) == set(entry["blocks"])
        assert len(stage.steps) == entry["steps"]
        assert stage.embeddings == entry["embeddings"]
    assert [block for part in plan.parts for block in part.blocks] == list(range(blocks))

    def stages_of(block: int) -> list[bool]:
        return [block in entry["blocks"] for entry in written]

    for part in plan.parts:
        assert len({tuple(stages_of(block)) for block in part.blocks}) == 1
        if part.index:
            assert stages_of(part.blocks.start) != stages_of(part.blocks.start - 1)


@always_the_same
@given(custom_stages())
def test_is_shrinking_means_that_nothing_ever_comes_back(case: tuple[int, list[dict[str, Any]]]) -> None:
    blocks, written = case
    sets = [set(entry["blocks"]) | ({"embeddings"} if entry["embeddings"] else set()) for entry in written]
    comes_back = any(new - old for old, new in pairwise(sets))
    assert custom_plan(blocks, written).is_shrinking is not comes_back


@always_the_same
@given(st.one_of(paper_plans(), custom_stages().map(lambda case: custom_plan(*case, always_train=["*norm*"]))))
def test_a_plan_survives_json(plan: StagePlan) -> None:
    assert StagePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@always_the_same
@given(st.data(), paper_plans(), st.integers(1, 40))
def test_the_account_is_the_sum_over_steps(data: st.DataObject, plan: StagePlan, steps_per_epoch: int) -> None:
    counts = data.draw(counts_for(plan))
    run = account(counts, plan, steps_per_epoch)
    updated = 0
    for step in range(plan.total_steps):
        stage = plan.stage_at(step)
        updated += counts.head + sum(counts.blocks[block] for block in stage.trainable_blocks)
        updated += counts.embeddings if stage.embeddings else 0
    everything = counts.embeddings + sum(counts.blocks) + counts.head
    assert run.exact_updated_params * steps_per_epoch == updated
    assert run.exact_updated_params_full * steps_per_epoch == everything * plan.total_steps
    assert sum(stage.epochs for stage in run.stages) * steps_per_epoch == plan.total_steps
    assert 0 <= run.saving <= 1
    if everything:
        assert run.saving == pytest.approx(1 - updated / (everything * plan.total_steps), abs=1e-12)


@always_the_same
@given(st.data(), st.integers(1, 12), st.integers(12, 60))
def test_freezing_more_never_updates_more(data: st.DataObject, stages: int, steps: int) -> None:
    plans = {option: plan_stages(12, stages, steps, option) for option in EMBEDDINGS}
    counts = data.draw(counts_for(plans["always"]))
    updated = {option: account(counts, plan, 1).exact_updated_params for option, plan in plans.items()}
    full = account(counts, plans["always"], 1).exact_updated_params_full
    assert updated["never"] <= updated["first_stage"] <= updated["always"] <= full
    one_stage = account(counts, plan_stages(12, 1, steps), 1)
    assert one_stage.exact_updated_params == full


@always_the_same
@given(st.data(), paper_plans())
def test_what_always_trains_is_counted_once_in_every_stage(data: st.DataObject, plan: StagePlan) -> None:
    bare = data.draw(counts_for(plan))
    extra_blocks = tuple(data.draw(st.integers(0, count)) for count in bare.blocks)
    extra_embeddings = data.draw(st.integers(0, bare.embeddings))
    counts = ComponentCounts(bare.embeddings, bare.blocks, bare.head, extra_embeddings, extra_blocks)
    for stage in plan.stages:
        frozen = [block for block in range(plan.num_blocks) if block not in stage.trainable_blocks]
        extra = sum(extra_blocks[block] for block in frozen) + (0 if stage.embeddings else extra_embeddings)
        assert counts.trainable(stage) == bare.trainable(stage) + extra <= counts.total
