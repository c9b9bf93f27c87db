"""Frozen means frozen: bit-identical weights from freeze to export, and what happens without a StageEngine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.engine.conftest import StagedRuns
from tests.engine.flavours import ALL, FLAVOURS
from tests.engine.problem import Phase, shrinking
from tests.engine.ranks_train import MODES, build_engine, optimizer_step, weights
from tests.engine.reference import Run
from tests.ranks import RankPools


def assert_frozen_is_frozen(runs: Sequence[Run], phases: Sequence[Phase]) -> None:
    """Weights that a phase does not train are after it, to the bit and on every rank, what they were before it."""
    for run in runs:
        for index, phase in enumerate(phases[1:], start=1):
            before, after = run.weights[index - 1], run.weights[index]
            frozen = [name for name in after if not phase.trains(name)]
            assert frozen
            moved = [name for name in frozen if not torch.equal(before[name], after[name])]
            assert not moved, f"phase {index}: {len(moved)} of {len(frozen)} frozen weights moved, e.g. {moved[0]}"
            # Matrices only: in bf16 a norm's weight of 1 may need more than two steps to reach the next number.
            matrices = [name for name in after if phase.trains(name) and after[name].ndim > 1]
            still = [name for name in matrices if torch.equal(before[name], after[name])]
            assert not still, f"phase {index}: {still[0]} trains and did not move"
    for name, weight in runs[0].weights[-1].items():
        assert all(torch.equal(weight, run.weights[-1][name]) for run in runs), f"ranks hold different {name}"


@pytest.mark.parametrize("mode", ["planned", "rotating"])
@pytest.mark.parametrize("name", FLAVOURS)
def test_frozen_weights_are_bit_identical_to_the_end(staged_runs: StagedRuns, name: str, mode: str) -> None:
    assert_frozen_is_frozen(staged_runs(name, mode), MODES[mode][0])


# Bare torch.optim.AdamW skips parameters without gradient: the one flavour that freezes by itself.
@pytest.mark.parametrize("name", [name for name in FLAVOURS if name != "zero0-fp32"])
def test_without_a_stage_engine_frozen_weights_move(ranks: RankPools, name: str) -> None:
    """The negative control: momentum and weight decay go on when one merely sets ``requires_grad=False``."""
    phases = shrinking(stages=2)
    runs = ranks(2).run(train_with_requires_grad_alone, flavour=name, phases=phases)
    with pytest.raises(AssertionError, match="frozen weights moved"):
        assert_frozen_is_frozen(runs, phases)


def train_with_requires_grad_alone(flavour: str, phases: tuple[Phase, ...]) -> Run:
    engine = build_engine(ALL[flavour])
    run = Run()
    for phase in phases:
        for name, parameter in engine.module.named_parameters():
            parameter.requires_grad_(phase.trains(name))
        for _ in range(phase.steps):
            run.losses.append(optimizer_step(engine, "bert", len(run.losses)))
        run.weights.append(weights(engine))
    return run
