"""What a user sees while a run goes on and at its end."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from progtuning_ds.accounting import ComponentCounts
from progtuning_ds.engine import StageTransition
from progtuning_ds.schedule import plan_stages
from progtuning_ds.train.observers import Observer
from progtuning_ds.train.progress import (
    ProgressBar,
    ProgressLines,
    human_bytes,
    make_progress,
    ranges,
    stage_line,
    step_words,
    what_trains,
)
from progtuning_ds.train.records import EvaluationRecord, RunRecord, StageRecord, StepRecord
from progtuning_ds.train.summary import print_comparison, print_summary

PLAN = plan_stages(num_blocks=6, num_stages=2, total_steps=20)


def step(index: int, loss: float = 0.5, rate: float = 100.0) -> StepRecord:
    return StepRecord(index, (index + 1) / 10, index // 10, loss, 1e-4, 1.0, 0.3, rate, 3 * 2**29)


def watched(kind: str, *, terminal: bool) -> str:
    """Everything shown of a short run."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    progress = make_progress(kind, console)
    progress.run_started(SimpleNamespace(plan=PLAN, counts=ComponentCounts(5, (1,) * 6, 2)))
    progress.stage_started(PLAN.stages[0], None)
    progress.steps_done([step(index) for index in range(10)])
    progress.evaluated(EvaluationRecord(9, 1.0, 0, "validation", ("epoch",), 7, {"accuracy": 0.75}, 1.0))
    released = {"exp_avg": 2**20, "exp_avg_sq": 2**20}
    transition = StageTransition(1, 10, ("a", "b"), (), released, {}, 0, True, 0.01)
    progress.stage_started(PLAN.stages[1], transition)
    progress.steps_done([step(index) for index in range(10, 20)])
    progress.close()
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_stage_loss_rate_throughput_memory_and_metrics(terminal: bool) -> None:
    shown = watched("auto", terminal=terminal)
    for words in (
        "stage 1/2: training embeddings, blocks 0-5 and the head for 10 steps",
        "loss 0.5000  lr 1.00e-04  100.0 samples/s  mem 1.5 GiB",
        "validation after epoch 1: accuracy 0.7500  (7 rows, 1.0 s)",
        "stage 2/2: training embeddings, blocks 3-5 and the head for 10 steps",
        "2 parameters froze, 0 joined: 2.0 MiB released on each rank, 0 B moved between ranks, 10 ms",
    ):
        assert words in shown
    assert ("\x1b[" in shown) == terminal, "control sequences belong on a terminal only"
    assert "20/20" in shown


def test_the_kind_of_progress_can_be_chosen() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    assert type(make_progress("auto", console)) is type(make_progress("bar", console)) is ProgressBar
    assert type(make_progress("lines", console)) is ProgressLines
    assert type(make_progress("off", console)) is Observer
    assert watched("off", terminal=True) == ""


def test_a_group_of_steps_is_averaged() -> None:
    words = step_words([step(0, loss=1.0, rate=50.0), step(1, loss=3.0, rate=150.0)], 2)
    assert "loss 2.0000" in words
    assert "75.0 samples/s" in words, "rows over seconds, which is the harmonic mean"


def test_a_component_in_which_a_method_has_nothing_is_not_said_to_train() -> None:
    stage = PLAN.stages[0]
    assert stage_line(stage, 2, ComponentCounts(5, (1,) * 6, 2)).endswith(
        "embeddings, blocks 0-5 and the head for 10 steps"
    )
    assert stage_line(stage, 2, ComponentCounts(0, (1,) * 6, 2)).endswith(
        "training blocks 0-5 and the head for 10 steps"
    )
    assert stage_line(stage, 2, ComponentCounts(0, (0, 1, 1, 0, 0, 0), 0)).endswith("training blocks 1-2 for 10 steps")
    assert what_trains(True, (4,), ComponentCounts(0, (1, 1, 0, 0, 0, 0), 0)) == ["no block"]


def test_block_ranges_and_bytes_are_short() -> None:
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert ranges((3,)) == "3"
    assert [human_bytes(count) for count in (0, 1023, 1024, 3 * 2**19, 2**31)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "2.0 GiB",
    ]


def stage(index: int, params: int, state: int) -> StageRecord:
    return StageRecord(
        index, 10 * index, 10, (0,), True, params, {}, (state, state), {}, 0, 0.0, 4.0, 80.0, {"accuracy": 0.7}
    )


def run(kind: str, updated: int) -> RunRecord:
    metrics = {"validation": {"accuracy": 0.875, "loss": 0.4}}
    return RunRecord(kind, 2, "cpu", 2, "fp32", 20, updated, 4000, 1 - updated / 4000, 9.0, "accuracy", metrics, {})


def test_the_summary_has_a_row_per_stage_and_what_was_saved() -> None:
    out = io.StringIO()
    print_summary(Console(file=out, width=120), run("progtuning", 3000), [stage(0, 2000, 2**20), stage(1, 1000, 2**19)])
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["1/2", "2,000", "1.0", "MiB", "80.0", "4.0", "0.7000"] in rows
    assert ["2/2", "1,000", "512.0", "KiB", "80.0", "4.0", "0.7000"] in rows
    assert "updated parameters 3,000 of 4,000 without freezing: 25.0% saved" in out.getvalue()
    assert "validation: accuracy 0.8750  loss 0.4000" in out.getvalue()


def test_the_comparison_has_a_column_per_run() -> None:
    out = io.StringIO()
    stages = ([stage(0, 2000, 2**20), stage(1, 1000, 2**19)], [stage(0, 2000, 2**20)])
    print_comparison(Console(file=out, width=120), [run("progtuning", 3000), run("full", 4000)], stages)
    rows = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "progtuning full" in rows
    assert "updated params 3,000 4,000" in rows
    assert "state per rank, last stage 512.0 KiB 1.0 MiB" in rows
    assert "validation accuracy 0.8750 0.8750" in rows
