"""DeepSpeed's own public functions go on working on an engine whose trainable set has changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.agreement import EXACT, Tolerance, assert_near, tolerance_for
from tests.engine.flavours import ALL, TORCH_ADAM
from tests.engine.problem import Phase
from tests.engine.ranks_train import ALL_BLOCKS, MODES, build_staged, optimizer_step, read_state, weights
from tests.engine.reference import Run
from tests.ranks import RankPools

PARTITIONED = (
    "zero1-fp32",
    "zero1-bf16",
    "bf16-optimizer",
    "zero2-bf16",
    "zero2-offload-fp32",
    "zero2-round-robin",
    "zero3-fp32",
    "zero3-bf16",
    "zero3-subgroups-fp32",
    "zero3-offload-bf16",
)
RESUMED = ("zero0-fp32", "zero0-bf16", "zero0-bf16-fused", *PARTITIONED)
SHAPES = ["planned", "rotating"]


def run_until(engine: Any, stages: Any, steps: range) -> list[list[float]]:
    losses = []
    for step in steps:
        stages.advance(step)
        losses.append(optimizer_step(engine, "bert", step))
    return losses


def state_around_each_transition(flavour: str, mode: str) -> list[tuple[Run, Run, tuple[str, ...]]]:
    """``(before, after, newcomers)`` of each transition, read with ``safe_get_full_*``."""
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    seen, step = [], 0
    for phase in phases:
        before, after = Run(), Run()
        if step:
            read_state(engine, before)
        transition = stages.advance(step)
        if transition is not None:
            read_state(engine, after, missing_ok=transition.unfrozen)
            after.weights.append(weights(engine))
            seen.append((before, after, transition.unfrozen))
        run_until(engine, stages, range(step, step + phase.steps))
        step += phase.steps
    return seen


@pytest.mark.parametrize("mode", SHAPES)
@pytest.mark.parametrize("name", PARTITIONED)
def test_state_of_survivors_is_carried_to_the_bit(ranks: RankPools, name: str, mode: str) -> None:
    phases, _ = MODES[mode]
    for seen in ranks(2).run(state_around_each_transition, flavour=name, mode=mode):
        assert len(seen) == len(phases) - 1
        for (before, after, newcomers), phase in zip(seen, phases[1:], strict=True):
            assert set(after.masters) == {n for n in after.weights[0] if phase.trains(n)}
            survivors = after.masters.keys() - set(newcomers)
            assert survivors <= before.masters.keys()
            for kind in ("masters", "exp_avg", "exp_avg_sq"):
                old, new = getattr(before, kind), getattr(after, kind)
                changed = [n for n in survivors if not torch.equal(old[n], new[n])]
                assert not changed, f"{kind} of {len(changed)} survivors changed, e.g. {changed[0]}"
            for name_ in newcomers:
                assert torch.equal(after.masters[name_], after.weights[0][name_].float())


def links_of_everything(flavour: str) -> dict[str, list[bool]]:
    """Whether ``safe_get_full_*`` answers: for what trains, and for what is frozen."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    phases, groups = MODES["planned"]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    run_until(engine, stages, range(phases[0].steps + 1))
    answers: dict[str, list[bool]] = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        answers[name] = [master is not None]
        if parameter.requires_grad:
            answers[name] += [
                safe_get_full_optimizer_state(parameter, key) is not None for key in ("exp_avg", "exp_avg_sq")
            ]
    return answers


@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-bf16", "bf16-optimizer"])
def test_every_group_answers_and_frozen_parameters_do_not(ranks: RankPools, name: str) -> None:
    for answers in ranks(2).run(links_of_everything, flavour=name):
        for parameter, found in answers.items():
            assert found == ([True] * 3 if MODES["planned"][0][1].trains(parameter) else [False])


# ---- checkpoints -------------------------------------------------------------------------------------------------

SAVED_AT = 4  # one step into the second stage of "planned", the end of the second phase of "rotating"


def train_save_and_go_on(flavour: str, mode: str, folder: str) -> tuple[Run, Run]:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    run_until(engine, stages, range(SAVED_AT))
    engine.save_checkpoint(folder, tag="here", client_state={"step": SAVED_AT})
    return everything(engine), finish(engine, stages, phases)


def resume_and_finish(flavour: str, mode: str, folder: str) -> tuple[Run, Run]:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups)
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


@pytest.mark.parametrize("mode", SHAPES)
@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes_to_the_bit(ranks: RankPools, tmp_path: Path, name: str, mode: str) -> None:
    arguments = {"flavour": name, "mode": mode, "folder": str(tmp_path)}
    through = ranks(2).run(train_save_and_go_on, **arguments)
    resumed = ranks(2).run(resume_and_finish, **arguments)
    # DeepSpeed's Adams multiply up beta**step in a run and take a power after loading: a rounding apart.
    going_on = EXACT if ALL[name].optimizer == TORCH_ADAM else tolerance_for(ALL[name].numerics)
    for (saved, through_end), (loaded, resumed_end) in zip(through, resumed, strict=True):
        assert_same(loaded, saved, EXACT)
        assert_same(resumed_end, through_end, going_on)


def save_in_a_later_stage(flavour: str, mode: str, folder: str) -> Run:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    run_until(engine, stages, range(SAVED_AT))
    engine.save_checkpoint(folder, tag="here")
    return everything(engine)


# DeepSpeed's script does not know BF16_Optimizer's checkpoints ("is not a zero checkpoint"), frozen or not.
@pytest.mark.parametrize("mode", SHAPES)
@pytest.mark.parametrize("name", [name for name in PARTITIONED if name != "bf16-optimizer"])
def test_zero_to_fp32_finds_every_parameter(ranks: RankPools, tmp_path: Path, name: str, mode: str) -> None:
    """Masters of what trains, bit16 weights of what is frozen; stock DeepSpeed leaves the latter out in ZeRO-1."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run = ranks(2).run(save_in_a_later_stage, flavour=name, mode=mode, folder=str(tmp_path))[0]
    exported = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag="here")
    assert exported.keys() >= run.weights[0].keys()
    for parameter, weight in run.weights[0].items():
        expected = run.masters.get(parameter, weight).float()
        assert torch.equal(exported[parameter].float(), expected), parameter


# ---- offload_states ------------------------------------------------------------------------------------------------


def train_with_states_away_in_between(flavour: str, mode: str, away: bool) -> Run:
    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups)
    run_until(engine, stages, range(SAVED_AT))
    if away:
        engine.offload_states()
        engine.reload_states()
    return finish(engine, stages, phases)


# DeepSpeed offloads states of its own FusedAdam only, in ZeRO-3.
@pytest.mark.parametrize("mode", SHAPES)
@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-bf16", "zero3-fp32-fused", "zero3-bf16-fused"])
def test_states_may_be_offloaded_and_reloaded_in_a_later_stage(ranks: RankPools, name: str, mode: str) -> None:
    arguments = {"flavour": name, "mode": mode}
    stayed, gone = (ranks(2).run(train_with_states_away_in_between, **arguments, away=away) for away in (False, True))
    for one, other in zip(gone, stayed, strict=True):
        assert_same(one, other, EXACT)


# ---- frozen prefix --------------------------------------------------------------------------------------------------


def which_blocks_take_part_in_backward(flavour: str, embeddings: str) -> list[bool]:
    """Of each block, whether its output requires grad in the last of three stages."""
    from tests.engine.problem import shrinking

    phases = shrinking(1, embeddings=embeddings)
    engine, stages = build_staged(ALL[flavour], phases, "ordinary" if embeddings == "never" else "plan")
    run_until(engine, stages, range(len(phases)))
    seen: list[bool] = []
    for layer in engine.module.bert.encoder.layer:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(first_tensor(output).requires_grad))
    optimizer_step(engine, "bert", 0)
    return seen[: len(ALL_BLOCKS)]


def first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
@pytest.mark.parametrize(("embeddings", "first"), [("always", 0), ("first_stage", 4), ("never", 4)])
def test_backward_stops_at_the_lowest_block_that_trains(
    ranks: RankPools, name: str, embeddings: str, first: int
) -> None:
    expected = [block >= first for block in ALL_BLOCKS]
    assert ranks(2).run(which_blocks_take_part_in_backward, flavour=name, embeddings=embeddings) == [expected] * 2
