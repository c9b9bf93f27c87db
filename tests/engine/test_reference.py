"""The oracle is itself proven: against torch's own AdamW and clipping, and against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.engine import problem, reference
from tests.engine.agreement import assert_agree, tolerance_for
from tests.engine.flavours import ONCE
from tests.engine.problem import NUM_BLOCKS, Phase, shrinking
from tests.engine.ranks_train import MODES
from tests.engine.reference import Numerics

EVERYTHING = (Phase(6, tuple(range(NUM_BLOCKS))),)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left)


# transformers computes a causal language model's loss in float32 whatever the model's dtype.
@pytest.mark.parametrize(("kind", "tolerance"), [("bert", 1e-10), ("llama", 1e-6)])
def test_without_freezing_it_is_torch_adamw_on_the_joint_batch(kind: str, tolerance: float) -> None:
    world_size, steps = 3, EVERYTHING[0].steps
    ours = reference.train(kind, EVERYTHING, world_size, Numerics(torch.float64, *[torch.float64] * 3))
    model = problem.build_model(kind, torch.float64)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": problem.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=problem.BASE_LR, betas=problem.BETAS, eps=problem.EPS)
    for step in range(steps):
        micro_batches = [
            problem.batch(kind, step, micro, rank)
            for micro in range(problem.ACCUMULATION)
            for rank in range(world_size)
        ]
        loss = sum(model(**inputs).loss for inputs in micro_batches) / len(micro_batches)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), problem.CLIP[kind])
        for group in optimizer.param_groups:
            group["lr"] = problem.BASE_LR * problem.lr_factor(step)
        optimizer.step()
        assert sum(ours.losses[step]) / len(micro_batches) == pytest.approx(loss.item(), abs=tolerance)
    assert largest_difference(ours.weights[-1], dict(model.named_parameters())) < tolerance
    assert min(ours.norms) < problem.CLIP[kind] < max(ours.norms), "both branches of clipping must be at work"


def test_float32_agrees_with_float64() -> None:
    single = reference.train("bert", shrinking(), 2, Numerics())
    double = reference.train("bert", shrinking(), 2, Numerics(torch.float64, *[torch.float64] * 3))
    assert torch.tensor(single.losses).sub(torch.tensor(double.losses)).abs().max() < 1e-5
    assert largest_difference(single.weights[-1], double.weights[-1]) < 1e-4


WRONG = {
    "moments lost": lambda state: (state.exp_avg.zero_(), state.exp_avg_sq.zero_()),
    "second moments lost": lambda state: state.exp_avg_sq.zero_(),
    "step count lost": lambda state: setattr(state, "step", 0),
    "master rounded": lambda state: state.master.copy_(state.master.bfloat16()),
}


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("numerics", [Numerics(), ONCE], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["planned", "rotating"])
def test_tolerances_tell_a_wrong_transition_from_a_right_one(monkeypatch, mode, numerics, mistake) -> None:
    """What parity would miss if it were looser: each mistake is made at every boundary, to all survivors."""
    phases, _ = MODES[mode]
    right, retarget = reference.train("bert", phases, 2, numerics), reference.retarget

    def wrong(states, trainable, numerics, *, first) -> None:
        before = len(states)
        retarget(states, trainable, numerics, first=first)
        if not first and len(states) != before:
            for state in states.values():
                WRONG[mistake](state)

    monkeypatch.setattr(reference, "retarget", wrong)
    run = reference.train("bert", phases, 2, numerics)
    split = [dataclasses.replace(run, losses=[step[i : i + 2] for step in run.losses]) for i in (0, 2)]
    with pytest.raises(AssertionError):
        assert_agree(split, right, tolerance_for(numerics))


def test_frozen_weights_stay_and_newcomers_start_afresh() -> None:
    phases = (
        Phase(3, tuple(range(NUM_BLOCKS))),
        Phase(2, (0, 3, 4, 5), embeddings=False),
        Phase(2, (1, 3, 4, 5)),
    )
    run = reference.train("bert", phases, 2, Numerics())
    frozen = [n for n in run.weights[0] if not phases[1].trains(n)]
    assert len([n for n in frozen if ".layer.1." in n]) == 16
    assert all(torch.equal(run.weights[0][n], run.weights[1][n]) for n in frozen)
    moved = [n for n in run.weights[0] if phases[1].trains(n)]
    assert not any(torch.equal(run.weights[0][n], run.weights[1][n]) for n in moved)
    query = "bert.encoder.layer.{}.attention.self.query.weight"
    assert {b: run.adam_steps[query.format(b)] for b in (1, 3, 4, 5)} == {1: 2, 3: 7, 4: 7, 5: 7}
    assert query.format(0) not in run.adam_steps
    assert run.adam_steps["bert.embeddings.word_embeddings.weight"] == 2
