"""What `progtuning plan --output` writes is a run: it trains, and holds what the plan said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from progtuning_ds.cli import main
from progtuning_ds.train.records import MemoryRecord, StepRecord, read_records
from tests.ranks import RankPools
from tests.train.test_profile import sources  # noqa: F401 - the same model and rows
from tests.train.test_run import train

STATES = ("weights", "master_weights", "exp_avg", "exp_avg_sq")
OPTIONS = "--gpus 2 --reserve 0 --seq-len 32 --global-batch 16 --precision fp32 --attention eager --kernel deepspeed"


def planned(source: Path, folder: Path, megabytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The proposal, and the run file with data in it."""
    options = [*OPTIONS.split(), "--memory", f"{megabytes}MB", "--output", str(folder / "plan")]
    assert main(["plan", "--model", str(source / "model"), *options]) == 0
    given = yaml.safe_load((folder / "plan" / "run.yaml").read_text())
    given["data"] = {"train_file": str(source / "train.csv"), "validation_file": str(source / "test.csv")}
    given |= {"output_dir": str(folder / "run"), "logging": {"progress": "off"}}
    return json.loads((folder / "plan" / "plan.json").read_text())["proposal"], given


@pytest.mark.slow
@pytest.mark.parametrize(("megabytes", "host_state"), [(66, "all"), (75, "lowest_part"), (110, "none")])
def test_a_plan_is_a_run_that_holds_what_it_said(
    ranks: RankPools,
    sources: Path,  # noqa: F811
    tmp_path: Path,
    megabytes: int,
    host_state: str,
) -> None:
    proposal, given = planned(sources, tmp_path, megabytes)
    assert proposal["host_state"] == host_state
    assert given["memory"].get("host_state", "none") == host_state
    assert given["memory"]["reinvest"] == ("unoffload" if host_state == "all" else "none")
    ranks(2).run(train, given=given)
    assert len(read_records(tmp_path / "run", StepRecord)) == 6
    for record, stage in zip(read_records(tmp_path / "run", MemoryRecord), proposal["stages"], strict=True):
        assert (record.micro_batch, record.accumulation) == (stage["micro_batch"], stage["accumulation"])
        assert record.predicted_host == stage["host_bytes"]
        for name in STATES:
            held = record.predicted.get(name, 0) + record.predicted_host.get(name, 0)
            assert held == stage["device_bytes"].get(name, 0) + stage["host_bytes"].get(name, 0)
            # After an evaluation ZeRO-3 holds weights that it fetched for a backward pass nobody ran.
            assert record.measured[name] == held or (name == "weights" and record.measured[name] > held)
