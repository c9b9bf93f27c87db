"""A checkpoint that another DeepSpeed's engine made, really: it goes on under this one, and the other way round."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.checkpoint.manifest import read_manifest
from tests.checkpoint.run import TOTAL, resume_and_finish, train_through
from tests.ranks import RankPools
from tests.ranks.pool import RankPool

AT = 3
OVERLAY = os.environ.get("DEEPSPEED_OVERLAY", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not OVERLAY,
        reason="needs a second DeepSpeed: pip install --no-deps --target DIR deepspeed==0.16.9, DEEPSPEED_OVERLAY=DIR",
    ),
]


@pytest.fixture(scope="module")
def others() -> Iterator[RankPool]:
    """Two ranks that import the other DeepSpeed."""
    sys.path.insert(0, OVERLAY)  # which ranks take over
    try:
        pool = RankPool(2)
    finally:
        sys.path.remove(OVERLAY)
    yield pool
    pool.close()


def version() -> str:
    import deepspeed

    return deepspeed.__version__


@pytest.mark.parametrize("flavour", ["zero1-fp32", "zero2-bf16", "zero3-fp32"])
@pytest.mark.parametrize("direction", ["from the other", "to the other"])
def test_a_run_goes_on_under_another_deepspeed(
    ranks: RankPools, others: RankPool, tmp_path: Path, flavour: str, direction: str
) -> None:
    first, second = (others, ranks(2)) if direction == "from the other" else (ranks(2), others)
    versions = [pool.run(version)[0] for pool in (first, second)]
    assert versions[0] != versions[1]
    through = first.run(train_through, flavour=flavour, plan="shrinking", folder=str(tmp_path))
    about = read_manifest(CheckpointStore(tmp_path).path(AT)).about
    assert about["versions"]["deepspeed"].split("+")[0] == versions[0].split("+")[0]
    resumed = second.run(resume_and_finish, flavour=flavour, plan="shrinking", folder=str(tmp_path), steps=[AT])
    for whole, (gone_on,) in zip(through, resumed, strict=True):
        for step in range(AT, TOTAL):
            assert gone_on.losses[step] == pytest.approx(whole.losses[step], abs=2e-5)
        for name, weight in whole.weights.items():
            torch.testing.assert_close(gone_on.weights[name], weight, rtol=0, atol=2e-4, msg=name)
