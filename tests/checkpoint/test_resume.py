"""A resumed run is the uninterrupted one to the bit: every flavour, any step of any stage, dropout on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from progtuning_ds.checkpoint import CheckpointStore, manifest
from progtuning_ds.checkpoint.manifest import MANIFEST, read_manifest, write_json, write_manifest
from tests.checkpoint.run import STEPS, TOTAL, Trained, resume_and_finish, train_through
from tests.ranks import RankPools

# Before the first boundary, at one (its transition is still to come), in the middle of the last stage.
AT = (1, STEPS, TOTAL - 1)
QUICK = [
    ("zero1-fp32", "shrinking"),
    ("zero2-bf16", "rotating"),
    ("zero3-bf16", "shrinking"),
]
REST = [
    (name, plan)
    for name in (
        "zero0-fp32",
        "zero0-bf16",
        "zero1-fp32",
        "zero1-bf16",
        "bf16-optimizer",
        "zero2-fp32",
        "zero2-bf16",
        "zero2-offload-fp32",
        "zero2-offload-bf16",
        "zero3-fp32",
        "zero3-bf16",
        "zero3-offload-fp32",
        "zero3-subgroups-fp32",
        "zero3-offload-bf16",
        "zero2-round-robin",
        "zero3-offload-everything",
    )
    for plan in ("shrinking", "rotating")
    if (name, plan) not in QUICK
]


def assert_same(resumed: Trained, through: Trained, step: int) -> None:
    assert resumed.losses == {at: losses for at, losses in through.losses.items() if at >= step}
    assert resumed.lrs == {at: lrs for at, lrs in through.lrs.items() if at >= step}
    for kind in ("weights", "masters", "exp_avg", "exp_avg_sq"):
        ours, theirs = getattr(resumed, kind), getattr(through, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), (kind, name)
    assert resumed.draws == through.draws


@pytest.mark.parametrize(("flavour", "plan"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_a_resumed_run_is_the_uninterrupted_one(ranks: RankPools, tmp_path: Path, flavour: str, plan: str) -> None:
    check(ranks, tmp_path, flavour, plan, AT)


def test_a_resumed_run_with_offload_is_the_uninterrupted_one(ranks: RankPools, tmp_path: Path) -> None:
    """From one checkpoint only: an engine with DeepSpeed's CPU Adam takes seconds to build."""
    check(ranks, tmp_path, "zero2-offload-fp32", "shrinking", (STEPS,))


def test_a_checkpoint_of_the_first_format_goes_on(ranks: RankPools, tmp_path: Path) -> None:
    """It had no files of settled weights, and was otherwise what a checkpoint before the first boundary is now."""
    through = ranks(2).run(train_through, flavour="zero2-bf16", plan="shrinking", folder=str(tmp_path))
    folder = CheckpointStore(tmp_path).path(1)
    seals = dict(read_manifest(folder).files)
    for rank in folder.glob("rank-*.json"):
        described = json.loads(rank.read_text())
        assert described.pop("settled") == {}
        seals[rank.name] = write_json(rank, described)
    with mock.patch.object(manifest, "FORMAT", 1):
        write_manifest(folder, replace(read_manifest(folder), files=seals))
    assert '"format":1' in (folder / MANIFEST).read_text()
    resumed = ranks(2).run(resume_and_finish, flavour="zero2-bf16", plan="shrinking", folder=str(tmp_path), steps=[1])
    for of_rank, whole in zip(resumed, through, strict=True):
        assert_same(of_rank[0], whole, 1)


def check(ranks: RankPools, folder: Path, flavour: str, plan: str, at: tuple[int, ...]) -> None:
    through = ranks(2).run(train_through, flavour=flavour, plan=plan, folder=str(folder))
    resumed = ranks(2).run(resume_and_finish, flavour=flavour, plan=plan, folder=str(folder), steps=at)
    assert through[0].losses != through[1].losses, "ranks see different rows"
    for of_rank, whole in zip(resumed, through, strict=True):
        for step, one in zip(at, of_rank, strict=True):
            assert_same(one, whole, step)
