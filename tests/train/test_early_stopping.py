"""A run that ends before its time: when, what it tells of itself, and that it can be resumed into the same end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from progtuning_ds.train.records import EvaluationRecord, RunRecord, StageRecord, StepRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import train

EPOCH = 4


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("early")
    tiny.save_model(folder / "model", layers=4)
    for name, count in (("train", 32), ("validation", 11), ("test", 7)):
        tiny.write_csv(folder / f"{name}.csv", tiny.rows(count, seed=count))
    files = {f"{name}_file": str(folder / f"{name}.csv") for name in ("train", "validation", "test")}
    return {
        "model": {"path": str(folder / "model")},
        "data": files,
        "train": {"epochs": 4, "global_batch_size": 8, "learning_rate": 1e-7},  # nothing is learnt
        "schedule": {"stage_lengths": [1.5, 1.5, 1.0]},
        "logging": {"progress": "off", "plot": False},
    }


@pytest.mark.parametrize("patience", [1, 2])
def test_a_run_ends_when_its_metric_has_not_risen(
    ranks: RankPools, tmp_path: Path, given: dict[str, Any], patience: int
) -> None:
    settings = {**given, "output_dir": str(tmp_path), "train": {**given["train"], "early_stopping": patience}}
    ranks(2).run(train, given=settings)
    done = (1 + patience) * EPOCH
    assert [record.step for record in read_records(tmp_path, StepRecord)] == list(range(done))
    (run,) = read_records(tmp_path, RunRecord)
    stages = read_records(tmp_path, StageRecord)
    assert run.total_steps == done == sum(stage.steps for stage in stages)
    assert [stage.steps for stage in stages] == ([6, 2] if patience == 1 else [6, 6])
    updated = sum(stage.trainable_params * stage.steps for stage in stages) / EPOCH
    assert run.updated_params == pytest.approx(updated, abs=1)
    last = read_records(tmp_path, EvaluationRecord)[-1]
    assert (last.split, last.reasons, last.rows, last.step) == ("test", ("end",), 7, done - 1)
    assert set(run.metrics) == {"validation", "test"}
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_by_default_a_run_goes_to_its_end(ranks: RankPools, tmp_path: Path, given: dict[str, Any]) -> None:
    ranks(2).run(train, given={**given, "output_dir": str(tmp_path)})
    assert read_records(tmp_path, RunRecord)[0].total_steps == 4 * EPOCH
