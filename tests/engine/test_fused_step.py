"""The fused step in the place of DeepSpeed's own: the same training, on real engines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.engine import problem
from tests.engine.agreement import assert_agree, oracle, tolerance_for
from tests.engine.conftest import StagedRuns
from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import (
    ALL_BLOCKS,
    MODES,
    build_staged,
    micro_step,
    optimizer_step,
    run_until,
    weights,
)
from tests.engine.reference import Run
from tests.ranks import RankPools, has_gpu_each

FLAVOURS = ("zero1-bf16", "zero2-fp32", "zero2-bf16", "zero2-bf16-fp32-accumulation", "zero3-fp32", "zero3-bf16")


@pytest.mark.parametrize("mode", ["planned", "rotating"])
@pytest.mark.parametrize("name", FLAVOURS)
def test_stages_train_as_the_oracle(staged_runs: StagedRuns, name: str, mode: str) -> None:
    runs = staged_runs(name, mode, kernel="reference")
    numerics = ALL[name].numerics
    device = "cuda" if has_gpu_each(2) else "cpu"
    expected = oracle("bert", MODES[mode][0], 2, numerics, device)
    assert_agree(runs, expected, tolerance_for(numerics))
    for run in runs:
        assert all(math.isfinite(norm) for norm in run.norms)


@pytest.mark.parametrize("name", ["zero1-fp32", "zero2-fp32-fused", "zero3-subgroups-fp32"])
def test_options_and_other_adams_train_as_the_oracle(staged_runs: StagedRuns, name: str) -> None:
    runs = staged_runs(name, "rotating", kernel="auto")
    numerics = ALL[name].numerics
    device = "cuda" if has_gpu_each(2) else "cpu"
    assert_agree(runs, oracle("bert", MODES["rotating"][0], 2, numerics, device), tolerance_for(numerics))


def train_with_a_named_optimizer(flavour: str, kernel: str) -> Run:
    from progtuning_ds.optim import register_optimizer

    register_optimizer()
    adam = {"lr": problem.BASE_LR, "betas": problem.BETAS, "eps": problem.EPS, "weight_decay": 0.0}
    engine, stages = build_staged(
        ALL[flavour],
        shrinking(),
        "plan",
        options={"kernel": kernel},
        optimizer={"type": "MaskedAdamW", "params": adam},
        zero_allow_untested_optimizer=True,
    )
    run = Run()
    for phase in shrinking():
        run.losses += run_until(engine, stages, range(len(run.losses), len(run.losses) + phase.steps))
        run.weights.append(weights(engine))
    run.norms = [math.nan] * len(run.losses)
    return run


@pytest.mark.parametrize(("name", "kernel"), [("zero2-fp32", "deepspeed"), ("zero3-fp32", "reference")])
def test_a_deepspeed_json_may_name_the_optimizer(ranks: RankPools, name: str, kernel: str) -> None:
    runs = ranks(2).run(train_with_a_named_optimizer, flavour=name, kernel=kernel)
    numerics = ALL[name].numerics
    device = "cuda" if has_gpu_each(2) else "cpu"
    assert_agree(runs, oracle("bert", shrinking(), 2, numerics, device), tolerance_for(numerics))


def train_with(kernel: str, flavour: str) -> dict[str, torch.Tensor]:
    engine, stages = build_staged(ALL[flavour], shrinking(steps=1), "plan", options={"kernel": kernel})
    run_until(engine, stages, range(3))
    return weights(engine)


@pytest.mark.parametrize("name", ["zero2-bf16", pytest.param("zero3-bf16", marks=pytest.mark.slow)])
def test_tritons_kernels_give_the_references_bits(ranks: RankPools, name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; pip install 'triton>=3.6' runs this")
    by_triton = ranks(2).run(train_with, kernel="triton", flavour=name)
    by_torch = ranks(2).run(train_with, kernel="reference", flavour=name)
    for ours, theirs in zip(by_triton, by_torch, strict=True):
        for parameter, value in theirs.items():
            assert torch.equal(ours[parameter], value), parameter


# ---- freezing by mask ----------------------------------------------------------------------------------------------


def freeze_in_mid_step(flavour: str) -> dict[str, Any]:
    """Freeze block 0 between two micro-batches, go on, compact, go on."""
    engine, stages = build_staged(
        ALL[flavour], (problem.Phase(9, ALL_BLOCKS),), "ordinary", options={"kernel": "reference"}
    )
    stages.advance(0)
    optimizer_step(engine, "bert", 0)
    micro_step(engine, "bert", 1, 0)
    engine.step()
    leaving = stages.blocks.blocks[0]
    stages.freeze(leaving)
    before = weights(engine)
    micro_step(engine, "bert", 1, 1)
    engine.step()
    optimizer_step(engine, "bert", 2)
    held = sum(stages.memory().values())
    compacted = stages.compact()
    freed = held - sum(stages.memory().values())
    optimizer_step(engine, "bert", 3)
    after = weights(engine)
    return {
        "leaving": leaving,
        "before": before,
        "after": after,
        "trains": stages.trainable_names,
        "frozen": compacted.frozen,
        "freed": freed,
    }


@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-bf16", "zero3-fp32"])
def test_a_mask_freezes_at_once_and_compaction_changes_nothing(ranks: RankPools, name: str) -> None:
    for seen in ranks(2).run(freeze_in_mid_step, flavour=name):
        assert set(seen["frozen"]) == set(seen["leaving"])
        assert not set(seen["leaving"]) & set(seen["trains"])
        assert seen["freed"] > 0
        for parameter, value in seen["before"].items():
            same = torch.equal(value, seen["after"][parameter])
            if parameter in seen["leaving"]:
                assert same, parameter
            elif value.ndim > 1:  # bf16 vectors near 1 may well round back to what they were
                assert not same, parameter


def masked_against_retargeted(flavour: str, by_mask: bool) -> Run:
    engine, stages = build_staged(
        ALL[flavour], (problem.Phase(9, ALL_BLOCKS),), "ordinary", options={"kernel": "reference"}
    )
    stages.advance(0)
    run = Run()
    for step in range(4):
        if step == 2:
            names = [n for n in stages.trainable_names if n not in stages.blocks.blocks[1]]
            if by_mask:
                stages.freeze(stages.blocks.blocks[1])
            else:
                stages.retarget(names)
        run.losses.append(optimizer_step(engine, "bert", step))
        run.norms.append(float(engine.get_global_grad_norm()))
    run.weights.append(weights(engine))
    return run


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-fp32"])
def test_a_mask_trains_as_a_transition_does(ranks: RankPools, name: str) -> None:
    masked = ranks(2).run(masked_against_retargeted, flavour=name, by_mask=True)
    moved = ranks(2).run(masked_against_retargeted, flavour=name, by_mask=False)
    assert_agree(masked, _joint(moved), tolerance_for(ALL[name].numerics))


def _joint(runs: list[Run]) -> Run:
    joint = Run(norms=runs[0].norms, weights=runs[0].weights)
    joint.losses = [[loss for run in runs for loss in run.losses[step]] for step in range(len(runs[0].losses))]
    return joint


# ---- what is not finite --------------------------------------------------------------------------------------------


def poison_one_rank(flavour: str, value: float) -> dict[str, Any]:
    import deepspeed.comm as dist

    engine, stages = build_staged(ALL[flavour], shrinking(), "plan", options={"kernel": "reference"})
    stages.advance(0)
    optimizer_step(engine, "bert", 0)
    before = weights(engine)
    step = engine.optimizer.step

    def poisoned() -> None:
        if dist.get_rank() == 1:
            gradients = engine.optimizer.averaged_gradients
            max(gradients[0], key=torch.Tensor.numel).view(-1)[0] = value
        step()

    engine.optimizer.step = poisoned
    optimizer_step(engine, "bert", 1)
    engine.optimizer.step = step
    skipped, norm = weights(engine), float(engine.get_global_grad_norm())
    optimizer_step(engine, "bert", 2)
    return {
        "unchanged": all(torch.equal(before[name], skipped[name]) for name in before),
        "norm": norm,
        "skipped_steps": engine.skipped_steps,
        "goes_on": any(not torch.equal(skipped[name], value) for name, value in weights(engine).items()),
        "finite": all(value.isfinite().all().item() for value in weights(engine).values()),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-fp32"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(ranks: RankPools, name: str, value: float) -> None:
    for seen in ranks(2).run(poison_one_rank, flavour=name, value=value):
        assert seen["unchanged"]
        assert seen["norm"] == math.inf
        assert seen["skipped_steps"] == 1
        assert seen["goes_on"]
        assert seen["finite"]


# ---- refusals ------------------------------------------------------------------------------------------------------


def refusal(flavour: str, kernel: str) -> str:
    try:
        build_staged(ALL[flavour], shrinking(), "plan", options={"kernel": kernel})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "kernel", "said"),
    [
        ("zero2-fp32", "tritn", "kernel must be one of auto, triton, reference, deepspeed, got 'tritn'; did you mean"),
        ("zero2-offload-fp32", "reference", "kernel must be deepspeed here, got 'reference': with optimizer offload"),
        ("zero0-fp32", "triton", "there is a fused step for ZeRO-1, 2 and 3, and none for AdamW"),
        ("zero0-fp32", "auto", ""),
    ],
)
def test_what_has_no_fused_step_is_refused_in_one_line(ranks: RankPools, name: str, kernel: str, said: str) -> None:
    for message in ranks(2).run(refusal, flavour=name, kernel=kernel):
        assert "\n" not in message
        assert said in message
        assert bool(message) == bool(said)
