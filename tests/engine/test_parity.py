"""Under a StageEngine, DeepSpeed trains what a single process trains that just stops updating what is frozen."""

from __future__ import annotations

import pytest
import torch

from tests.engine.agreement import assert_agree, oracle, tolerance_for
from tests.engine.conftest import StagedRuns
from tests.engine.flavours import ALL, CORE, FLAVOURS, HALF_PRECISION, LOW_PRECISION_STATES, VARIANTS
from tests.engine.ranks_train import MODES, StagedRun
from tests.ranks import RankPools, has_gpu_each


def check(runs: list[StagedRun], name: str, mode: str, kind: str = "bert") -> None:
    phases, _ = MODES[mode]
    numerics = ALL[name].numerics
    device = "cuda" if has_gpu_each(len(runs)) else "cpu"
    assert_agree(runs, oracle(kind, phases, len(runs), numerics, device), tolerance_for(numerics))
    for run in runs:
        assert bool(run.masters) == (ALL[name].stage > 0), "DeepSpeed's public functions see the masters"


@pytest.mark.parametrize("mode", ["planned", "rotating"])
@pytest.mark.parametrize(
    "name",
    [*FLAVOURS, *(pytest.param(name, marks=pytest.mark.gpu) for name in HALF_PRECISION)],
)
def test_stages_train_as_the_oracle(staged_runs: StagedRuns, name: str, mode: str) -> None:
    runs = staged_runs(name, mode)
    check(runs, name, mode)
    transitions = [boundary.transition for boundary in runs[0].boundaries]
    assert len(transitions) == len(MODES[mode][0]) - 1
    if mode == "planned":
        assert all(t.planned and t.moved_bytes == 0 and not t.unfrozen for t in transitions)
    else:
        assert not any(t.planned for t in transitions)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "rotating") for name in VARIANTS]
    + [(name, "planned") for name in ("zero2-round-robin", "zero2-small-buckets", "zero3-small-buckets")],
)
def test_options_of_zero_train_as_the_oracle(staged_runs: StagedRuns, name: str, mode: str) -> None:
    check(staged_runs(name, mode), name, mode)


@pytest.mark.parametrize("mode", ["planned", "rotating", "growing"])
@pytest.mark.parametrize("name", LOW_PRECISION_STATES)
def test_masters_and_moments_in_bf16_train_as_the_oracle_and_stay_in_bf16(
    staged_runs: StagedRuns, name: str, mode: str
) -> None:
    runs = staged_runs(name, mode)
    check(runs, name, mode)
    for run in runs:
        for boundary in run.boundaries:
            memory = boundary.transition.memory_bytes
            assert memory["exp_avg"] == memory["exp_avg_sq"]
            if memory["master_weights"] and not boundary.transition.unfrozen:
                assert memory["master_weights"] == memory["exp_avg"], "two bytes an element, both"
        assert {t.dtype for t in (*run.masters.values(), *run.exp_avg.values())} <= {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("mode", ["ordinary", "growing"])
@pytest.mark.parametrize("name", CORE)
def test_groups_that_were_not_made_for_the_plan_train_as_the_oracle(
    staged_runs: StagedRuns, name: str, mode: str
) -> None:
    check(staged_runs(name, mode), name, mode)


@pytest.mark.parametrize("mode", ["embeddings-first", "embeddings-never"])
@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
def test_frozen_embeddings_train_as_the_oracle(staged_runs: StagedRuns, name: str, mode: str) -> None:
    check(staged_runs(name, mode), name, mode)


@pytest.mark.parametrize("mode", ["planned", "rotating"])
@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
def test_a_language_model_trains_as_the_oracle(staged_runs: StagedRuns, name: str, mode: str) -> None:
    check(staged_runs(name, mode, kind="llama"), name, mode, kind="llama")


@pytest.mark.parametrize(
    ("world_size", "name", "mode"),
    [
        (1, "zero0-bf16-fused", "planned"),
        (1, "zero1-bf16", "planned"),
        (1, "zero2-fp32", "rotating"),
        (1, "zero3-offload-fp32", "rotating"),
        (3, "zero1-bf16", "rotating"),
        (3, "bf16-optimizer", "rotating"),
        (3, "zero2-fp32", "planned"),
        (3, "zero2-offload-fp32", "rotating"),
        (3, "zero3-fp32", "planned"),
        (3, "zero3-bf16", "rotating"),
        (4, "zero2-fp32", "rotating"),
        (4, "zero3-fp32", "planned"),
    ],
)
def test_any_world_size_trains_as_the_oracle(staged_runs: StagedRuns, name: str, world_size: int, mode: str) -> None:
    check(staged_runs(name, mode, world_size=world_size), name, mode)


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-bf16", "bf16-optimizer"])
def test_planned_and_unplanned_boundaries_are_interchangeable(staged_runs: StagedRuns, name: str) -> None:
    planned, ordinary = (staged_runs(name, mode)[0] for mode in ("planned", "ordinary"))
    assert planned.masters.keys() == ordinary.masters.keys()
    largest = max((planned.masters[n] - ordinary.masters[n]).abs().max().item() for n in planned.masters)
    assert largest < tolerance_for(ALL[name].numerics).largest


def test_adam_counts_steps_per_parameter(ranks: RankPools) -> None:
    """Bias correction of newcomers starts afresh while survivors go on."""
    assert ranks(2).run(adam_steps, flavour="zero0-fp32") == [{"0": 2.0, "1": 6.0, "2": 2.0, "5": 6.0}] * 2


def adam_steps(flavour: str) -> dict[str, float]:
    from tests.engine.ranks_train import build_staged, optimizer_step

    phases, groups = MODES["rotating"]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    for step in range(6):
        stages.advance(step)
        optimizer_step(engine, "bert", step)
    weight = "bert.encoder.layer.{}.output.dense.weight"
    parameters: dict[str, torch.nn.Parameter] = dict(engine.module.named_parameters())
    state = engine.basic_optimizer.state
    return {
        str(block): float(state[parameters[weight.format(block)]]["step"])
        for block in range(6)
        if parameters[weight.format(block)] in state
    }
