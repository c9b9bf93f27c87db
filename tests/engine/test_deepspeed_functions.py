"""DeepSpeed's own public functions go on working on an engine whose trainable set has changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import ALL_BLOCKS, MODES, build_staged, optimizer_step, read_state, run_until, weights
from tests.engine.reference import Run
from tests.ranks import RankPools


def state_around_each_transition(flavour: str, mode: str) -> list[tuple[Run, Run, tuple[str, ...]]]:
    """``(before, after, newcomers)`` of each transition, read with ``safe_get_full_*``; one step per phase."""
    phases, groups = MODES[mode]
    phases = tuple(dataclasses.replace(phase, steps=1) for phase in phases)
    engine, stages = build_staged(ALL[flavour], phases, groups)
    seen = []
    for step in range(len(phases)):
        before, after = Run(), Run()
        if step:
            read_state(engine, before)
        transition = stages.advance(step)
        if transition is not None:
            read_state(engine, after, missing_ok=transition.unfrozen)
            after.weights.append(weights(engine))
            seen.append((before, after, transition.unfrozen))
        optimizer_step(engine, "bert", step)
    return seen


@pytest.mark.parametrize("mode", ["planned", "rotating"])
@pytest.mark.parametrize(
    "name",
    [
        "zero1-bf16",
        "bf16-optimizer",
        "zero2-fp32",
        "zero2-offload-fp32",
        "zero2-round-robin",
        "zero3-bf16",
        "zero3-subgroups-fp32",
        "zero3-offload-bf16",
    ],
)
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


def which_blocks_take_part_in_backward(flavour: str, embeddings: str) -> list[bool]:
    """Of each block, whether its output requires grad in the last of three stages."""
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
