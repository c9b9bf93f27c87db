"""A rank that dies, fails or is asked to stop: the others never hang, and the reason is told."""

from __future__ import annotations

import os
import time
from pathlib import Path

from progtuning_ds.train.outcome import PEER_LOST, PREEMPTED
from tests.faults.conftest import Bench
from tests.faults.launch import launch
from tests.faults.trap import Kill
from tests.train.test_resume import same_results


def sleep_in_the_second_step() -> None:
    """Rank 0 does something endless that is no collective, so that nothing tells it of rank 1's end."""
    from progtuning_ds.train import loop

    train_step = loop.TrainingLoop._train_step

    def sleepy(self, step, *rest):
        if step == 1 and os.environ["RANK"] == "0":
            time.sleep(600)
        train_step(self, step, *rest)

    loop.TrainingLoop._train_step = sleepy


def raise_in_the_second_step() -> None:
    from progtuning_ds.train import loop

    train_step = loop.TrainingLoop._train_step

    def failing(self, step, *rest):
        if step == 1 and os.environ["RANK"] == "1":
            raise RuntimeError("the reason")
        train_step(self, step, *rest)

    loop.TrainingLoop._train_step = failing


def test_a_rank_that_waits_for_a_dead_one_ends_with_the_reason(bench: Bench, tmp_path: Path) -> None:
    arguments = bench.arguments(tmp_path / "run", "zero2")
    ended = launch(arguments, tmp_path, kill=Kill("forward", 3, (1,)), prepare=sleep_in_the_second_step)
    assert ended.codes == (PEER_LOST, -9), ended.said
    assert ended.lasted < 10
    assert "error: rank 0 stops: rank 1 (process " in ended.said
    assert "died without a word: killed, or out of memory" in ended.said


def test_a_rank_that_fails_says_why_on_all_others(bench: Bench, tmp_path: Path) -> None:
    ended = launch(bench.arguments(tmp_path / "run", "zero2"), tmp_path, prepare=raise_in_the_second_step)
    assert ended.codes == (PEER_LOST, 1), ended.said
    assert ended.lasted < 10
    assert "error: rank 0 stops: rank 1 failed: RuntimeError: the reason" in ended.said
    assert ended.said.count("RuntimeError: the reason") >= 2, "rank 1 itself shows its traceback"


def test_sigterm_to_one_rank_saves_and_ends_all_with_code_75(bench: Bench, tmp_path: Path) -> None:
    arguments = bench.arguments(tmp_path / "run", "zero2", "--resume", "auto")
    ended = launch(arguments, tmp_path, kill=Kill("backward", 9, (1,), signal=15))
    assert ended.codes == (PREEMPTED, PREEMPTED), ended.said
    assert ended.said.count("stopped by SIGTERM after step 5 of 10; the run is saved") == 1
    assert launch(arguments, tmp_path).codes == (0, 0)
    same_results(tmp_path / "run", bench.whole("zero2").folder)
