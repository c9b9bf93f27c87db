"""The embedded default, whole: what `make demo` promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from progtuning_ds.train.records import EvaluationRecord, RunRecord, StageRecord, read_records
from tests.train.test_launch import launch


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_beats_majority_clearly_while_its_state_shrinks(tmp_path: Path) -> None:
    done = launch("launch/train.py", "--config", "demo", f"output_dir={tmp_path}", timeout=1700)
    assert done.returncode == 0, done.stderr
    (run,) = read_records(tmp_path, RunRecord)
    stages = read_records(tmp_path, StageRecord)
    assert {record.rows for record in read_records(tmp_path, EvaluationRecord)} == {1500}
    # Majority is 0.51; the standard error at 1,500 rows is one point.
    assert run.metrics["validation"]["accuracy"] > 0.78
    assert len(stages) == 3
    states = [max(stage.state_bytes_per_rank) for stage in stages]
    assert states[0] > states[1] > states[2]
    assert [stage.moved_bytes for stage in stages] == [0, 0, 0]
