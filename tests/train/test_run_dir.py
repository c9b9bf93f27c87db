"""A run is never overwritten silently, and overwriting removes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from progtuning_ds.errors import ConfigError
from progtuning_ds.train.records import (
    FILES,
    EvaluationRecord,
    RecordLog,
    StepRecord,
    read_records,
)
from progtuning_ds.train.run_dir import check_run_dir, make_run_dir


def test_a_run_is_refused_and_the_nearest_free_name_given(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_run_dir(folder, overwrite=False)
    make_run_dir(folder)
    (tmp_path / "run-2").mkdir()
    (folder / "steps.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError) as caught:
        check_run_dir(folder, overwrite=False)
    assert f"output_dir={tmp_path / 'run-3'}" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    check_run_dir(folder, overwrite=True)


def test_overwriting_leaves_files_of_other_origin(tmp_path: Path) -> None:
    for name in (*FILES.values(), "config.yaml", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_text("x")
    make_run_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    check_run_dir(tmp_path, overwrite=False)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="must be a directory"):
        check_run_dir(tmp_path / "run", overwrite=True)


def test_records_read_back_as_they_were_written(tmp_path: Path) -> None:
    step = StepRecord(0, 0.1, 0, 0.7, 1e-4, None, 0.5, 64.0, 1024)
    evaluation = EvaluationRecord(9, 1.0, 0, "validation", ("epoch", "stage"), 5, {"accuracy": 0.8}, 0.1)
    log = RecordLog(tmp_path)
    for record in (step, evaluation, step):
        log.write(record)
    assert read_records(tmp_path, StepRecord) == [step, step]
    assert read_records(tmp_path, EvaluationRecord) == [evaluation]
