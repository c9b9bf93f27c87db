"""Optimizers whose state is 8-bit blocks, through the stage engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import problem
from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import build_staged, optimizer_step, weights
from tests.ranks import RankPools


def build(flavour: str, optimizer: str, groups: str) -> tuple[Any, Any]:
    import bitsandbytes

    from progtuning_ds import MaskedAdamW

    # Registered for the JSON by the name under which DeepSpeed looks in torch.optim.
    torch.optim.EightBit = {  # type: ignore[attr-defined]
        "masked": lambda params, **options: MaskedAdamW(params, **options, state_bits=8),
        "bitsandbytes": lambda params, **options: bitsandbytes.optim.AdamW8bit(params, **options, min_8bit_size=256),
    }[optimizer]
    adam = {"lr": problem.BASE_LR, "betas": problem.BETAS, "eps": problem.EPS, "weight_decay": 0.0}
    return build_staged(
        ALL[flavour],
        shrinking(),
        groups,
        optimizer={"type": "EightBit", "params": adam},
        zero_allow_untested_optimizer=True,
        scheduled=False,
    )


def states(engine: Any) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        for state in engine.basic_optimizer.state.values()
    ]


def planned(flavour: str, optimizer: str) -> dict[str, Any]:
    engine, stages = build(flavour, optimizer, "plan")
    seen: dict[str, Any] = {"released": [], "carried": [], "losses": [], "uint8": False}
    frozen: dict[str, torch.Tensor] = {}
    step = 0
    for phase in shrinking():
        before = states(engine)
        transition = stages.advance(step)
        if transition is not None:
            after = states(engine)
            seen["released"].append(sum(transition.released_bytes.values()))
            known = {tuple(sorted((k, v.sum().item()) for k, v in state.items() if v.numel() > 1)) for state in before}
            seen["carried"].append(
                all(tuple(sorted((k, v.sum().item()) for k, v in s.items() if v.numel() > 1)) in known for s in after)
                and 0 < len(after) < len(before)
            )
            full = weights(engine)
            frozen |= {name: full[name] for name in transition.frozen}
        for _ in range(phase.steps):
            seen["losses"] += optimizer_step(engine, "bert", step)
            step += 1
    seen["uint8"] = any(value.dtype == torch.uint8 for state in states(engine) for value in state.values())
    final = weights(engine)
    seen["frozen"] = bool(frozen) and all(torch.equal(final[name], value) for name, value in frozen.items())
    return seen


@pytest.mark.parametrize("optimizer", ["masked", "bitsandbytes"])
@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
def test_planned_boundaries_keep_the_blocks_of_survivors_and_release_the_others(
    ranks: RankPools, name: str, optimizer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    for seen in ranks(2).run(planned, flavour=name, optimizer=optimizer):
        assert seen["uint8"]
        assert seen["frozen"]
        assert len(seen["released"]) == 2
        assert all(released > 0 for released in seen["released"])
        assert all(seen["carried"])
        assert all(loss == loss for loss in seen["losses"])


def unplanned(flavour: str, optimizer: str) -> tuple[str, bool]:
    from progtuning_ds.errors import UnsupportedStateError

    engine, stages = build(flavour, optimizer, "ordinary")
    stages.advance(0)
    optimizer_step(engine, "bert", 0)
    before = states(engine)
    names = [name for name in stages.trainable_names if ".layer.0." not in name]
    try:
        stages.retarget(names)
    except UnsupportedStateError as error:
        after = states(engine)
        same = all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)
        return f"{type(error).__name__}: {error}", same and len(stages.trainable_names) > len(names)
    return "", False


@pytest.mark.parametrize("optimizer", ["masked", "bitsandbytes"])
def test_an_unplanned_change_refuses_blocks_it_would_cut_and_changes_nothing(ranks: RankPools, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    for message, unchanged in ranks(2).run(unplanned, flavour="zero2-fp32", optimizer=optimizer):
        assert message.startswith("UnsupportedStateError: optimizer state ")
        assert "cannot be re-partitioned" in message
        assert unchanged
