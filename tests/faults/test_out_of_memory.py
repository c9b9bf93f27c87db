"""Memory runs out on one rank at a larger micro-batch: the run falls back, remembers, and learns the same.

The bench's model has dropout, so a pass that left a trace would show in every later loss.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from progtuning_ds.train.outcome import MEMORY, PEER_LOST
from progtuning_ds.train.records import MemoryRecord, read_records
from tests.faults.conftest import Bench
from tests.faults.launch import launch
from tests.faults.trap import Kill
from tests.train.test_resume import same_results

SPEND = ("memory.budget=64GB", "memory.reinvest=micro_batch")
ROWS, LARGER = 3, 6


def starve(where: str, rank: int, most_rows: int = ROWS) -> None:
    """From now on a rank has no memory for more rows: in forward, in the middle of backward, or in the step."""
    import torch

    from progtuning_ds.tasks.classification import ClassificationTask

    if os.environ["RANK"] != str(rank):
        return
    compute, update, seen = ClassificationTask.loss, torch.optim.AdamW.step, [0]

    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def loss(self: Any, model: Any, batch: Any) -> Any:
        seen[0] = next(iter(batch.values())).shape[0]
        if seen[0] <= most_rows or where == "step":
            return compute(self, model, batch)
        if where == "forward":
            run_out()
        # The top block's gradients are there by then, and on their way to other ranks in a real pass.
        hook = (
            getattr(model, "module", model)
            .bert.encoder.layer[1]
            .register_full_backward_hook(lambda *_: (hook.remove(), run_out()))
        )
        return compute(self, model, batch)

    def step(self: Any, *rest: Any) -> Any:
        return run_out() if where == "step" and seen[0] > most_rows else update(self, *rest)

    ClassificationTask.loss = loss
    torch.optim.AdamW.step = step


def passes(folder: Path) -> list[tuple[int, int, bool]]:
    return [(r.micro_batch, r.accumulation, r.fell_back) for r in read_records(folder, MemoryRecord)]


FELL_BACK = [(ROWS, 2, False), (ROWS, 2, True), (ROWS, 2, True)]


@pytest.mark.parametrize(
    ("deepspeed", "where", "rank"),
    [
        ("zero2", "backward", 1),
        pytest.param("zero1", "backward", 0, marks=pytest.mark.slow),
        pytest.param("zero2", "forward", 0, marks=pytest.mark.slow),
        pytest.param("zero1", "forward", 1, marks=pytest.mark.slow),
    ],
)
def test_one_rank_that_runs_out_takes_all_back_to_fewer_rows(
    bench: Bench, tmp_path: Path, deepspeed: str, where: str, rank: int
) -> None:
    arguments = bench.arguments(tmp_path / "run", deepspeed, *SPEND)
    ended = launch(arguments, tmp_path, prepare=partial(starve, where, rank))
    assert ended.codes == (0, 0), ended.said
    assert ended.said.count("warning: memory ran out with 6 rows per pass; back to 3, for the rest of the run") == 1
    assert passes(tmp_path / "run") == FELL_BACK
    same_results(tmp_path / "run", bench.whole(deepspeed).folder)


@pytest.mark.slow
def test_a_resumed_run_does_not_try_again(bench: Bench, tmp_path: Path) -> None:
    arguments = bench.arguments(tmp_path / "run", "zero2", *SPEND, "--resume", "auto")
    killed = launch(arguments, tmp_path, kill=Kill("backward", 9, (0, 1)), prepare=partial(starve, "backward", 1))
    assert killed.codes == (-9, -9), killed.said
    ended = launch(arguments, tmp_path)  # with memory enough by now: nobody asks
    assert ended.codes == (0, 0), ended.said
    assert "warning: memory ran out" not in ended.said
    assert "6 rows per pass ran out of memory in stage 2 before: 3 in all stages (remove " in ended.said
    assert passes(tmp_path / "run")[-1] == (ROWS, 2, True)
    same_results(tmp_path / "run", bench.whole("zero2").folder)
    again = launch([*bench.arguments(tmp_path / "run", "zero2", *SPEND), "--overwrite"], tmp_path)
    assert again.codes == (0, 0), again.said
    assert passes(tmp_path / "run") == [(ROWS, 2, False), (LARGER, 1, False), (LARGER, 1, False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "where"), [("zero3", "forward"), ("zero3", "backward"), ("zero2", "step"), ("zero3", "step")]
)
def test_where_a_pass_cannot_be_undone_the_run_ends_with_one_line_and_goes_on_with_fewer_rows(
    bench: Bench, tmp_path: Path, deepspeed: str, where: str
) -> None:
    arguments = bench.arguments(tmp_path / "run", deepspeed, *SPEND, "--resume", "auto")
    starved = partial(starve, where, 1)
    ended = launch(arguments, tmp_path, prepare=starved)
    assert ended.codes == (PEER_LOST, MEMORY), ended.said
    assert ended.lasted < 15, "the other rank does not wait"
    line = "memory ran out in stage 2/3 with 6 rows per pass; the same command with --resume auto goes on with 3 "
    assert f"error: rank 1: {line}" in ended.said
    assert "Traceback" not in ended.said
    ended = launch(arguments, tmp_path, prepare=starved)
    assert ended.codes == (0, 0), ended.said
    assert [micro for micro, *_ in passes(tmp_path / "run")] == [ROWS] * 3
    same_results(tmp_path / "run", bench.whole(deepspeed).folder)


@pytest.mark.slow
def test_rows_of_the_first_stage_that_are_too_many_end_the_run_with_what_to_set(bench: Bench, tmp_path: Path) -> None:
    arguments = bench.arguments(tmp_path / "run", "zero2")
    ended = launch(arguments, tmp_path, prepare=partial(starve, "forward", 0, most_rows=1))
    assert ended.codes == (MEMORY, PEER_LOST), ended.said
    line = "error: memory ran out in stage 1/3 with 3 rows per pass; set train.micro_batch_size=1 and go on with "
    assert line in ended.said
    more = [*arguments, "train.micro_batch_size=1", "--resume", "auto"]
    assert launch(more, tmp_path, prepare=partial(starve, "forward", 0, most_rows=1)).codes == (0, 0)
