"""Checkpoints of a later stage: they resume to the bit, they export completely, and states may go away in between."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.agreement import EXACT, Tolerance, assert_near, tolerance_for
from tests.engine.flavours import ALL, TORCH_ADAM
from tests.engine.problem import Phase
from tests.engine.ranks_train import MODES, build_staged, read_state, run_until, weights
from tests.engine.reference import Run
from tests.ranks import RankPools

SAVED_AT = 4  # steps done: the second phase is over, the third begins
MANY = ("zero1-bf16", "zero2-bf16", "zero2-offload-fp32", "zero3-bf16")
# Every flavour where groups are dropped; a few where they were cut, merged and joined.
SAVED = [
    *((name, "planned") for name in ("zero0-fp32", "zero0-bf16", "zero0-bf16-fused", "zero1-fp32", "bf16-optimizer")),
    *((name, "planned") for name in ("zero2-round-robin", "zero3-fp32", "zero3-subgroups-fp32", "zero3-offload-bf16")),
    *((name, mode) for name in MANY for mode in ("planned", "rotating")),
    ("bf16-optimizer", "rotating"),
    ("zero3-fp32-fused", "rotating"),
]
# DeepSpeed's script knows no checkpoints of stage 0, and of BF16_Optimizer says "is not a zero checkpoint".
EXPORTED = [(name, mode) for name, mode in SAVED if ALL[name].stage > 0 and name != "bf16-optimizer"]
# Of ZeRO-3, DeepSpeed moves states of its own FusedAdam only.
MOVABLE = [(name, mode) for name, mode in SAVED if name in ("zero1-bf16", "zero2-bf16", "zero3-fp32-fused")]

Saved = Callable[[str, str], tuple[Path, list[tuple[Run, Run]]]]


@pytest.fixture(scope="module")
def saved(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``saved(flavour, mode)``: the folder of a checkpoint, and per rank the run when it was saved and at its end."""

    @functools.cache
    def train(flavour: str, mode: str) -> tuple[Path, list[tuple[Run, Run]]]:
        folder = tmp_path_factory.mktemp("checkpoint")
        return folder, ranks(2).run(train_save_and_go_on, flavour=flavour, mode=mode, folder=str(folder))

    return train


def train_save_and_go_on(flavour: str, mode: str, folder: str, kernel: str = "deepspeed") -> tuple[Run, Run]:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups, options={"kernel": kernel})
    run_until(engine, stages, range(SAVED_AT))
    engine.save_checkpoint(folder, tag="here", client_state={"step": SAVED_AT})
    return everything(engine), finish(engine, stages, phases)


def resume_and_finish(flavour: str, mode: str, folder: str, kernel: str = "deepspeed") -> tuple[Run, Run]:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups, options={"kernel": kernel})
    for first in range(SAVED_AT):
        stages.advance(first)  # through the same stages, without a step
    path, client_state = engine.load_checkpoint(folder, tag="here")
    assert path is not None
    assert client_state["step"] == SAVED_AT
    return everything(engine), finish(engine, stages, phases)


def finish(engine: Any, stages: Any, phases: tuple[Phase, ...]) -> Run:
    losses = run_until(engine, stages, range(SAVED_AT, sum(phase.steps for phase in phases)))
    return everything(engine, losses)


def everything(engine: Any, losses: Sequence[list[float]] = ()) -> Run:
    """Weights, masters and moments now."""
    run = Run(losses=list(losses), weights=[weights(engine)])
    read_state(engine, run)
    return run


def assert_same(ours: Run, theirs: Run, tolerance: Tolerance) -> None:
    for one, other in zip(ours.losses, theirs.losses, strict=True):
        assert one == pytest.approx(other, abs=tolerance.loss)
    assert_near(ours.weights[0], theirs.weights[0], tolerance, "weights")
    for kind in ("masters", "exp_avg", "exp_avg_sq"):
        if getattr(theirs, kind) or getattr(ours, kind):  # stage 0 links no state to parameters
            assert_near(getattr(ours, kind), getattr(theirs, kind), tolerance, kind)


@pytest.mark.parametrize(("name", "mode"), SAVED)
def test_a_checkpoint_resumes_to_the_bit(ranks: RankPools, saved: Saved, name: str, mode: str) -> None:
    folder, through = saved(name, mode)
    resumed = ranks(2).run(resume_and_finish, flavour=name, mode=mode, folder=str(folder))
    # DeepSpeed's Adams multiply up beta**step in a run and take a power after loading: a rounding apart.
    going_on = EXACT if ALL[name].optimizer == TORCH_ADAM else tolerance_for(ALL[name].numerics)
    for (when_saved, through_end), (when_loaded, resumed_end) in zip(through, resumed, strict=True):
        assert_same(when_loaded, when_saved, EXACT)
        assert_same(resumed_end, through_end, going_on)


@pytest.mark.parametrize(("name", "mode"), [("zero2-bf16", "rotating"), ("zero3-fp32", "planned")])
def test_a_checkpoint_of_the_fused_step_resumes_to_the_bit(
    ranks: RankPools, tmp_path: Path, name: str, mode: str
) -> None:
    where = {"flavour": name, "mode": mode, "folder": str(tmp_path), "kernel": "reference"}
    through = ranks(2).run(train_save_and_go_on, **where)
    resumed = ranks(2).run(resume_and_finish, **where)
    for (when_saved, through_end), (when_loaded, resumed_end) in zip(through, resumed, strict=True):
        assert_same(when_loaded, when_saved, EXACT)
        assert_same(resumed_end, through_end, EXACT)


@pytest.mark.parametrize(("name", "mode"), EXPORTED)
def test_zero_to_fp32_finds_every_parameter(saved: Saved, name: str, mode: str) -> None:
    """Masters of what trains, bit16 weights of what is frozen; stock DeepSpeed leaves the latter out in ZeRO-1."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, runs = saved(name, mode)
    run, _ = runs[0]
    exported = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="here")
    assert exported.keys() >= run.weights[0].keys()
    for parameter, weight in run.weights[0].items():
        expected = run.masters.get(parameter, weight).float()
        assert torch.equal(exported[parameter].float(), expected), parameter


def train_with_states_away_in_between(flavour: str, mode: str) -> Run:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    run_until(engine, stages, range(SAVED_AT))
    engine.offload_states()
    engine.reload_states()
    return finish(engine, stages, phases)


@pytest.mark.parametrize(("name", "mode"), MOVABLE)
def test_states_may_be_offloaded_and_reloaded_in_a_later_stage(
    ranks: RankPools, saved: Saved, name: str, mode: str
) -> None:
    _, stayed = saved(name, mode)
    gone = ranks(2).run(train_with_states_away_in_between, flavour=name, mode=mode)
    for one, (_, other) in zip(gone, stayed, strict=True):
        assert_same(one, other, EXACT)
