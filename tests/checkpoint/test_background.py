"""A save in the background: training goes on, the checkpoint is of the step it was asked for, and is whole or none."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from progtuning_ds.checkpoint import CheckpointStore
from tests.checkpoint.run import STEPS, TOTAL, Trained, build, read, resume_and_finish, train
from tests.checkpoint.test_resume import assert_same
from tests.ranks import RankPools

AT = STEPS + 1  # in the second stage: one part has settled


def save_while_training(flavour: str, folder: str, fail: bool) -> tuple[Trained, list[str]]:
    """Save in the background; files are written only after the run, stage transition included, has gone on.

    Returns:
        What the run computed, and what was seen of the store on the way.
    """
    import torch.distributed as dist

    from progtuning_ds.checkpoint import BackgroundSave, saving
    from progtuning_ds.errors import CheckpointError

    engine, stages = build(flavour)
    trained, seen = Trained(), []
    train(engine, stages, range(AT), trained)
    go, link_or_write = threading.Event(), saving.link_or_write

    def slow(file, target):
        if threading.current_thread() is not threading.main_thread():
            go.wait()
            if fail and dist.get_rank() == 1:
                raise OSError(28, "No space left on device")
        return link_or_write(file, target)

    saving.link_or_write = slow
    try:
        save = BackgroundSave(stages, folder, AT, program={"step": AT})
        train(engine, stages, range(AT, TOTAL), trained)
        seen.append(f"{CheckpointStore(Path(folder)).steps()} {save.is_written()}")
        go.set()
        try:
            seen.append(save.finish().name)
        except CheckpointError as error:
            seen.append(str(error))
    finally:
        saving.link_or_write = link_or_write
    return read(engine, stages, trained), seen


@pytest.mark.parametrize(
    "flavour",
    [
        "zero2-bf16",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero0-fp32", "zero3-fp32", "zero2-offload-fp32")),
    ],
)
def test_training_goes_on_and_the_checkpoint_is_of_its_step(ranks: RankPools, tmp_path: Path, flavour: str) -> None:
    through = ranks(2).run(save_while_training, flavour=flavour, folder=str(tmp_path), fail=False)
    assert [seen for _, seen in through] == [["[] False", f"step-0000000{AT}"]] * 2
    resumed = ranks(2).run(resume_and_finish, flavour=flavour, plan="shrinking", folder=str(tmp_path), steps=[AT])
    for (whole, _), of_rank in zip(through, resumed, strict=True):
        assert_same(of_rank[0], whole, AT)


def test_a_rank_that_cannot_write_is_told_on_all_and_nothing_is_left(ranks: RankPools, tmp_path: Path) -> None:
    through = ranks(2).run(save_while_training, flavour="zero2-bf16", folder=str(tmp_path), fail=True)
    line = f"the checkpoint of step {AT} cannot be written: rank 1: No space left on device; there is no earlier one"
    assert [seen for _, seen in through] == [["[] False", line]] * 2
    assert list(tmp_path.iterdir()) == []
