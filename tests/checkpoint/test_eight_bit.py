"""Optimizer state in 8-bit blocks: to the bit into the same layout, within half a step of its map into another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.ranks_train import optimizer_step
from tests.engine.test_eight_bit import HALF_STEP, build, decoded, joined
from tests.ranks import RankFailure, RankPools

STEPS = 3


def save(flavour: str, optimizer: str, folder: str, kind: str = "bert") -> dict[str, Any]:
    from progtuning_ds.checkpoint import save_checkpoint

    engine, stages = build(flavour, optimizer, "plan", kind)
    for step in range(STEPS):
        stages.advance(step)
        optimizer_step(engine, kind, step)
    save_checkpoint(stages, folder, STEPS)
    return {"before": decoded(stages), "next": optimizer_step(engine, kind, STEPS)}


def load(flavour: str, optimizer: str, folder: str, kind: str = "bert") -> dict[str, Any]:
    from progtuning_ds.checkpoint import load_checkpoint

    engine, stages = build(flavour, optimizer, "plan", kind)
    load_checkpoint(stages, folder)
    return {"after": decoded(stages), "next": optimizer_step(engine, kind, STEPS)}


def compare(saved: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> float:
    """Check that every moment is within the bound, and return the share that is the same to the bit."""
    exact = total = 0
    for kind, bound in HALF_STEP.items():
        before, after = joined(saved, "before", kind), joined(loaded, "after", kind)
        assert after.keys() == before.keys()
        for parameter, (values, largest) in after.items():
            old = before[parameter][0]
            assert values.shape == old.shape
            assert ((values - old).abs() <= bound * largest).all(), f"{kind} of {parameter}"
            exact += int((values == old).sum())
            total += values.numel()
    return exact / total


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["masked", "bitsandbytes"])
def test_the_same_layout_takes_it_to_the_bit(ranks: RankPools, tmp_path: Any, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    saved = ranks(2).run(save, flavour="zero2-fp32", optimizer=optimizer, folder=str(tmp_path))
    loaded = ranks(2).run(load, flavour="zero2-fp32", optimizer=optimizer, folder=str(tmp_path))
    assert compare(saved, loaded) == 1
    assert [one["next"] for one in loaded] == [one["next"] for one in saved]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_by", "saved_on", "loaded_by", "loaded_on", "optimizer"),
    [
        ("zero2-fp32", 2, "zero2-fp32", 1, "masked"),
        ("zero2-fp32", 2, "zero3-fp32", 4, "masked"),
        ("zero3-fp32", 2, "zero1-fp32", 1, "masked"),
        ("zero2-fp32", 1, "zero2-fp32", 2, "bitsandbytes"),
    ],
)
def test_another_layout_forms_blocks_anew(
    ranks: RankPools, tmp_path: Any, saved_by: str, saved_on: int, loaded_by: str, loaded_on: int, optimizer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    saved = ranks(saved_on).run(save, flavour=saved_by, optimizer=optimizer, folder=str(tmp_path))
    loaded = ranks(loaded_on).run(load, flavour=loaded_by, optimizer=optimizer, folder=str(tmp_path))
    assert 0.05 < compare(saved, loaded) <= 1
    if saved_on == loaded_on:
        before, after = (torch.tensor([one["next"] for one in runs]).mean(dim=0) for runs in (saved, loaded))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_buffers_of_a_single_block_go_to_other_ranks(
    ranks: RankPools, tmp_path: Any, saved_on: int, loaded_on: int
) -> None:
    """With LoRA, the classifier's bias is a group by itself: its one scale is state of a block, not of the buffer."""
    given = {"flavour": "zero2-fp32", "optimizer": "masked", "folder": str(tmp_path), "kind": "bert+rank1"}
    saved = ranks(saved_on).run(save, **given)
    loaded = ranks(loaded_on).run(load, **given)
    assert 0.05 < compare(saved, loaded) <= 1


@pytest.mark.slow
def test_state_of_mixed_width_is_refused_with_the_way_out(ranks: RankPools, tmp_path: Any) -> None:
    """bitsandbytes keeps 32 bits where a tensor is small, as some sub-groups of ZeRO-3 are."""
    pytest.importorskip("bitsandbytes")
    ranks(1).run(save, flavour="zero3-subgroups-fp32", optimizer="bitsandbytes", folder=str(tmp_path))
    with pytest.raises(RankFailure, match=r"is kept in different ways; load it with the number of ranks and the ZeRO"):
        ranks(1).run(load, flavour="zero2-fp32", optimizer="bitsandbytes", folder=str(tmp_path))
