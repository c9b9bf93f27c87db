"""MaskedAdamW as an ordinary optimizer, against torch's AdamW on the same gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from progtuning_ds import MaskedAdamW
from progtuning_ds.optim import MASTERS, register_optimizer

LR = 1e-2


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """A matrix, a vector of odd length and a single element."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 33), (257,), (1,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(params: Iterable[torch.nn.Parameter], step: int, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype or p.dtype)


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:], "weight_decay": 0.0, "lr": 3 * LR, "betas": (0.8, 0.99)},
    ]


@pytest.mark.parametrize("max_norm", [0.0, 3.0])
def test_it_is_adamw_in_double_precision(max_norm: float) -> None:
    ours, theirs = parameters(), parameters(torch.float64)
    optimizer = MaskedAdamW(groups(ours), lr=LR, max_norm=max_norm)
    oracle = torch.optim.AdamW(groups(theirs), lr=LR)
    for step in range(30):
        give_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        before = [p.grad.clone() for p in ours if p.grad is not None]
        optimizer.step()
        oracle.step()
        assert all(torch.equal(a, p.grad) for a, p in zip(before, ours, strict=True) if p.grad is not None)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_two_runs_give_the_same_bits(kernel: str) -> None:
    runs = []
    for _ in range(2):
        params = parameters(torch.bfloat16)
        optimizer = MaskedAdamW(params, lr=LR, kernel=kernel, master="stochastic", seed=3)
        for step in range(5):
            give_gradients(params, step)
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_a_remainder_keeps_the_masters_bits() -> None:
    kept = {}
    for master in ("fp32", "remainder"):
        params = parameters(torch.bfloat16)
        optimizer = MaskedAdamW(params, lr=LR, master=master, kernel="reference")
        for step in range(10):
            give_gradients(params, step)
            optimizer.step()
        kept[master] = (params, optimizer)
    fp32, lean = kept["fp32"], kept["remainder"]
    for p, q in zip(fp32[0], lean[0], strict=True):
        high = q.view(torch.int16).int() << 16
        master = (high + lean[1].state[q]["remainder"].int()).view(torch.float32)
        assert torch.equal(master, fp32[1].state[p]["master"])


def test_what_is_frozen_or_has_no_gradient_stays_to_the_bit_and_counts_no_step() -> None:
    params = parameters()
    optimizer = MaskedAdamW(groups(params), lr=LR)
    give_gradients(params, 0)
    optimizer.step()
    matrix, vector, single = params
    before = [copy.deepcopy((p.data, optimizer.state[p])) for p in params]
    optimizer.freeze([matrix])
    give_gradients(params, 1)
    assert matrix.grad is not None
    matrix.grad.fill_(math.nan)
    vector.grad = None
    optimizer.step()
    for p, (weight, state) in zip([matrix, vector], before, strict=False):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
    assert not torch.equal(single, before[2][0])
    assert optimizer.skipped_steps == 0
    optimizer.unfreeze([matrix])
    give_gradients(params, 2)
    optimizer.step()
    assert not torch.equal(matrix, before[0][0])
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_in_any_dtype(value: float) -> None:
    wide, narrow = parameters(), parameters(torch.bfloat16)
    optimizer = MaskedAdamW(wide + narrow, lr=LR, max_norm=1.0)
    give_gradients(wide + narrow, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [p.clone() for p in wide + narrow]
    give_gradients(wide + narrow, 1)
    assert narrow[1].grad is not None
    narrow[1].grad[5] = value
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before[1], wide + narrow, strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("master", MASTERS)
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_bit(master: str, state_bits: int) -> None:
    def build(params: list[torch.nn.Parameter]) -> MaskedAdamW:
        return MaskedAdamW(groups(params), lr=LR, master=master, state_bits=state_bits, kernel="reference")

    whole = parameters(torch.bfloat16)
    optimizer = build(whole)
    for step in range(4):
        give_gradients(whole, step)
        optimizer.step()
        if step == 1:
            saved = copy.deepcopy((optimizer.state_dict(), [p.data for p in whole]))
    resumed = [torch.nn.Parameter(data) for data in saved[1]]
    optimizer = build(resumed)
    optimizer.load_state_dict(saved[0])
    for step in range(2, 4):
        give_gradients(resumed, step)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))


def test_a_scheduler_and_a_closure_work_as_with_any_optimizer() -> None:
    params = parameters()
    optimizer = MaskedAdamW(params, lr=LR)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    held = [p.clone() for p in params]
    second = optimizer.step(closure)
    assert second < first
    assert all(torch.equal(p, q) for p, q in zip(params, held, strict=True)), "the learning rate is 0 by now"


def test_deepspeed_finds_it_by_name() -> None:
    register_optimizer()
    assert getattr(torch.optim, "MaskedAdamW") is MaskedAdamW  # noqa: B009 - a name torch's stubs do not know


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"master": "fp16"}, "master must be one of fp32, remainder, stochastic, got 'fp16'"),
        ({"state_bits": 4}, "state_bits must be 32 or 8, got 4"),
        ({"max_norm": -1.0}, "max_norm must be at least 0"),
        ({"lr": -1.0}, "lr must be at least 0"),
    ],
)
def test_wrong_settings_get_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        MaskedAdamW(parameters(), **options)
    assert "\n" not in str(caught.value)
