"""DeepSpeed's monitors get what the records say."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from progtuning_ds.train.records import EvaluationRecord, StageRecord, StepRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import settings, train

ROWS_PER_STEP = 12


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model", layers=2)
    tiny.write_csv(tmp_path / "train.csv", tiny.rows(40, seed=1))
    tiny.write_csv(tmp_path / "test.csv", tiny.rows(11, seed=2))
    return tmp_path


def series(folder: Path, name: str) -> list[tuple[int, float]]:
    """Points of a CSV file of DeepSpeed's monitor."""
    with (folder / f"{name}.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header[0] == "step"
    return [(int(float(at)), float(value)) for at, value in lines]


def check(got: Any, records: list[StepRecord], evaluations: list[EvaluationRecord], stages: list[StageRecord]) -> None:
    """Compare what a monitor holds with the records; `got` gives the points of a name."""
    for name, field in (("loss", "loss"), ("lr", "learning_rate"), ("grad_norm", "grad_norm"), ("stage", "stage")):
        expected = [((record.step + 1) * ROWS_PER_STEP, getattr(record, field)) for record in records]
        points = got(f"Train/{name}")
        assert [at for at, _ in points] == [at for at, _ in expected], name
        assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert all(value > 0 for _, value in got("Train/samples_per_second"))
    for name in ("accuracy", "loss"):
        expected = [((record.step + 1) * ROWS_PER_STEP, record.metrics[name]) for record in evaluations]
        assert [at for at, _ in got(f"Eval/{name}")] == [at for at, _ in expected]
        assert [value for _, value in got(f"Eval/{name}")] == pytest.approx([v for _, v in expected], rel=1e-6)
    params = [value for _, value in got("Stage/trainable_params")]
    assert params == [stage.trainable_params for stage in stages]
    assert all(before > after for before, after in pairwise(params))


def test_monitors_get_losses_scores_and_stages(ranks: RankPools, sources: Path) -> None:
    monitor = {"enabled": True, "job_name": "job"}
    engine = {"zero_optimization": {"stage": 2}, "csv_monitor": {**monitor, "output_path": str(sources / "csv")}}
    given = settings(sources, sources / "run", deepspeed=engine, logging={"steps": 3, "plot": False})
    ranks(2).run(train, given=given)
    folder = sources / "run"
    records, evaluations = read_records(folder, StepRecord), read_records(folder, EvaluationRecord)
    stages = read_records(folder, StageRecord)

    def got(name: str) -> list[tuple[int, float]]:
        return series(sources / "csv" / "job", name.replace("/", "_"))

    check(got, records, evaluations, stages)
    # DeepSpeed's own are over the same rows.
    assert [at for at, _ in got("Train/Samples/lr")] == [at for at, _ in got("Train/loss")]


def test_tensorboard_gets_the_same(ranks: RankPools, sources: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    engine = {
        "zero_optimization": {"stage": 2},
        "tensorboard": {"enabled": True, "output_path": str(sources / "tb"), "job_name": "job"},
    }
    given = settings(sources, sources / "run", deepspeed=engine, logging={"plot": False})
    ranks(2).run(train, given=given)
    events = reader.EventAccumulator(str(sources / "tb" / "job"))
    events.Reload()
    folder = sources / "run"
    records, evaluations = read_records(folder, StepRecord), read_records(folder, EvaluationRecord)
    check(
        lambda name: [(event.step, event.value) for event in events.Scalars(name)],
        records,
        evaluations,
        read_records(folder, StageRecord),
    )


def test_a_monitor_that_is_not_installed_is_one_line(ranks: RankPools, sources: Path) -> None:
    engine = {"zero_optimization": {"stage": 2}, "comet": {"enabled": True}}
    given = settings(sources, sources / "run", deepspeed=engine)
    with pytest.raises(
        AssertionError, match=r"comet\.enabled in .* needs a package that is not here: pip install come"
    ):
        ranks(1).run(train, given=given)
