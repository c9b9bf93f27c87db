"""Memory is asserted, not believed: by formula, by counting live tensors, and by the kernel's account."""

from __future__ import annotations

import pytest

from tests.engine import problem
from tests.engine.conftest import StagedRuns
from tests.engine.flavours import ALL, FLAVOURS
from tests.engine.footprint import footprint, gradient_bytes
from tests.engine.ranks_train import Boundary

# Groups cut in order, as in "ordinary", where the flavours differ; across parts everywhere.
ORDINARY = ("zero0-bf16", "bf16-optimizer", "zero2-bf16", "zero2-offload-fp32", "zero3-bf16")
RUNS = [(n, m) for n in FLAVOURS for m in ("planned", "rotating")] + [(n, "ordinary") for n in ORDINARY]
NUMELS = {name: p.numel() for name, p in problem.build_model("bert").named_parameters()}
# One scalar per master (Adam's step) comes or goes with it.
SCALARS = 4 * 128


def boundaries(staged_runs: StagedRuns, name: str, mode: str) -> list[tuple[int, Boundary]]:
    return [(rank, b) for rank, run in enumerate(staged_runs(name, mode)) for b in run.boundaries]


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_optimizer_state_is_what_the_formula_says(staged_runs: StagedRuns, name: str, mode: str) -> None:
    for rank, boundary in boundaries(staged_runs, name, mode):
        for moment, newcomers in ((0, ()), (1, boundary.transition.unfrozen)):
            expected = footprint(ALL[name], boundary.groups[moment], NUMELS, rank, 2, newcomers)
            reported = boundary.reported[moment]
            assert {key: reported[key] for key in expected} == expected
            assert reported["other_state"] == 0


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_gradient_buffers_are_what_the_formula_says(staged_runs: StagedRuns, name: str, mode: str) -> None:
    for rank, boundary in boundaries(staged_runs, name, mode):
        before, after = (gradient_bytes(ALL[name], groups, NUMELS, rank, 2) for groups in boundary.groups)
        assert boundary.reported[0]["gradients"] == before
        if mode == "planned":
            assert boundary.reported[1]["gradients"] == after
        else:  # under offload, a parameter that a rank has just come to own gets its buffer with its first gradient
            assert boundary.reported[1]["gradients"] <= after


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_what_is_reported_is_what_is_held(staged_runs: StagedRuns, name: str, mode: str) -> None:
    for _, boundary in boundaries(staged_runs, name, mode):
        for reported, held in zip(boundary.reported, boundary.held, strict=True):
            assert reported["exp_avg"] == held.exp_avg
            assert reported["exp_avg_sq"] == held.exp_avg_sq
            if reported["master_weights"]:  # else the optimizer updates the weights themselves
                assert reported["master_weights"] >= held.masters  # newcomers are not in the state yet
        before, after = boundary.reported
        released = {key: before[key] - after[key] for key in before}
        assert boundary.transition.released_bytes == released
        assert boundary.transition.memory_bytes == after
        fallen = boundary.held[0].live - boundary.held[1].live
        assert fallen >= sum(released.values()) - SCALARS, "something still holds what was reported as released"


@pytest.mark.parametrize("name", [n for n in FLAVOURS if n.startswith(("zero1", "zero2", "bf16", "zero3"))])
def test_shares_stay_balanced(staged_runs: StagedRuns, name: str) -> None:
    for mode in ("planned", "rotating"):
        first, second = (run.boundaries for run in staged_runs(name, mode))
        for one, other in zip(first, second, strict=True):
            for key in ("master_weights", "exp_avg", "exp_avg_sq"):
                assert one.reported[1][key] == other.reported[1][key]


@pytest.mark.parametrize("name", FLAVOURS)
def test_a_planned_boundary_gives_back_the_dropped_part_to_the_byte(staged_runs: StagedRuns, name: str) -> None:
    """12 B per owned frozen element in ZeRO-2 (master and two moments), 16 B with ZeRO-3's fp32 gradient, ..."""
    flavour = ALL[name]
    for rank, boundary in boundaries(staged_runs, name, "planned"):
        transition = boundary.transition
        dropped = [g for g in boundary.groups[0] if g not in boundary.groups[1]]
        assert sorted(n for g in dropped for n in g) == sorted(transition.frozen)
        expected = footprint(flavour, dropped, NUMELS, rank, 2)
        for key, value in expected.items():
            assert transition.released_bytes[key] == value
        assert transition.moved_bytes == 0
        assert transition.released_bytes["weights"] == 0
