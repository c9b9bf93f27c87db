"""A rehearsed pass says whether memory suffices and leaves no trace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from progtuning_ds.train.rehearsal import rehearse

BATCH = {"x": torch.ones(4, 8)}


class Model(nn.Module):
    """Two layers with dropout, the first one recomputed in backward, and a weight that both ends share."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.use_reentrant = use_reentrant
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run."""
        self.calls += 1
        x = x.requires_grad_(self.use_reentrant)
        hidden = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        return self.last(nn.functional.dropout(hidden))


def task(**hooks: Any) -> Any:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        value = model(batch["x"].clone()).sum()
        if "forward" in hooks:
            raise hooks["forward"]
        if "backward" in hooks:
            value.register_hook(lambda _: (_ for _ in ()).throw(hooks["backward"]))
        return value

    return SimpleNamespace(loss=loss)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_rehearsal_leaves_no_trace(use_reentrant: bool) -> None:
    model = Model(use_reentrant)
    fired = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    before, random = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    assert rehearse(task(), model, BATCH, ballast=100)
    assert model.calls == 1
    assert not fired, "nobody's hooks have run"
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    task().loss(model, BATCH).backward()
    assert set(fired) == {"first.weight", "first.bias"}, "and they are still there"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), True),
        (RuntimeError("a shape does not fit"), False),
    ],
)
def test_what_fails_is_told_apart(where: str, error: RuntimeError, ran_out: bool) -> None:
    model = Model()
    random = torch.get_rng_state()
    if ran_out:
        assert not rehearse(task(**{where: error}), model, BATCH, ballast=0)
    else:
        with pytest.raises(RuntimeError, match="a shape does not fit"):
            rehearse(task(**{where: error}), model, BATCH, ballast=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_room_that_a_real_pass_would_hold_counts() -> None:
    assert not rehearse(task(), Model(), BATCH, ballast=2**52)


def test_a_compiled_module_is_not_compiled_anew() -> None:
    model, compiled = Model(), []
    model.compile(backend=lambda graph, _: (compiled.append(1), graph)[1])
    assert rehearse(task(), model, BATCH, ballast=0)
    assert not compiled
    model(BATCH["x"].clone())
    assert compiled, "it still is compiled for others"
