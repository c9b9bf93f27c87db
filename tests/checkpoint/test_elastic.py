"""A checkpoint of one number of ranks and ZeRO stage goes on under another: same state, same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.run import TOTAL, Trained, build, read, resume_and_finish, train_through
from tests.ranks import RankFailure, RankPools

SAVED_AT = 3  # in the second of three stages
# DeepSpeed's own Adams round differently from torch's; fp32 everywhere, so all else is the order of sums.
CLOSE = 2e-5
QUICK = [
    ("zero2-fp32", 2, "zero2-fp32", 1),
    ("zero3-fp32", 2, "zero1-fp32", 1),
    ("zero1-fp32", 1, "zero2-fp32", 2),
]
REST = [
    ("zero2-fp32", 2, "zero3-fp32", 4),
    ("zero3-fp32", 4, "zero2-offload-fp32", 2),
    ("zero2-offload-fp32", 2, "zero3-fp32", 2),
    ("zero0-fp32", 2, "zero3-fp32", 1),
    ("zero3-subgroups-fp32", 2, "zero2-fp32", 4),
    ("zero3-fp32", 1, "zero3-subgroups-fp32", 4),
    ("zero1-fp32", 4, "zero0-fp32", 2),
    ("zero3-offload-fp32", 2, "zero3-offload-fp32", 4),
]


def load_and_look(flavour: str, folder: str, plan: str) -> Trained:
    from progtuning_ds.checkpoint import CheckpointStore, load_checkpoint

    engine, stages = build(flavour, plan, dropout=0.0)
    load_checkpoint(stages, CheckpointStore(Path(folder)).path(SAVED_AT))
    return read(engine, stages, Trained())


def losses_of_a_step(runs: list[Trained], step: int) -> list[float]:
    """Mean over the ranks of each pass."""
    return torch.tensor([run.losses[step] for run in runs]).mean(dim=0).tolist()


@pytest.mark.parametrize("plan", ["shrinking", pytest.param("rotating", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("saved_by", "saved_on", "loaded_by", "loaded_on"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_another_number_of_ranks_and_zero_stage_go_on(
    ranks: RankPools, tmp_path: Path, saved_by: str, saved_on: int, loaded_by: str, loaded_on: int, plan: str
) -> None:
    folder = str(tmp_path)
    through = ranks(saved_on).run(train_through, flavour=saved_by, plan=plan, folder=folder, dropout=0.0)
    before = ranks(saved_on).run(load_and_look, flavour=saved_by, folder=folder, plan=plan)[0]
    after = ranks(loaded_on).run(load_and_look, flavour=loaded_by, folder=folder, plan=plan)
    for one in after:
        for kind in ("weights", "masters", "exp_avg", "exp_avg_sq"):
            ours, theirs = getattr(one, kind), getattr(before, kind)
            for name in theirs.keys() & ours.keys():
                assert torch.equal(ours[name], theirs[name]), (kind, name)
    resumed = ranks(loaded_on).run(
        resume_and_finish, flavour=loaded_by, plan=plan, folder=folder, steps=[SAVED_AT], dropout=0.0
    )
    for step in range(SAVED_AT, TOTAL):
        ours = losses_of_a_step([runs[0] for runs in resumed], step)
        assert ours == pytest.approx(losses_of_a_step(through, step), abs=CLOSE)
    last = resumed[0][0].weights
    for name, weight in through[0].weights.items():
        torch.testing.assert_close(last[name], weight, rtol=0, atol=2e-4, msg=name)


def load_with_sgd(folder: str) -> None:
    from progtuning_ds.checkpoint import load_checkpoint

    _, stages = build("zero2-fp32", optimizer={"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}})
    load_checkpoint(stages, folder)


def test_state_of_another_optimizer_is_refused_by_name(ranks: RankPools, tmp_path: Path) -> None:
    ranks(1).run(train_through, flavour="zero2-fp32", plan="shrinking", folder=str(tmp_path))
    with pytest.raises(RankFailure, match=r"holds the state of AdamW, which SGD cannot take over"):
        ranks(1).run(load_with_sgd, folder=str(tmp_path))
