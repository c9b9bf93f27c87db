"""What a second start meets: a run in use, other settings or data, a wrong directory, a run that had ended early."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.errors import CheckpointError, ConfigError
from progtuning_ds.train.records import EvaluationRecord, RunRecord, StepRecord, read_records
from progtuning_ds.train.run_dir import check_run_dir
from progtuning_ds.train.run_lock import LOCK, run_lock
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_modes import dry
from tests.train.test_resume import run, same_results
from tests.train.test_run import settings

EPOCH = 5
TWO = {"schedule": {"num_stages": 2}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("sources"), 58, 9, layers=2)


def test_a_directory_in_use_is_refused_with_who_uses_it(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(sources, tmp_path / "run")
    with run_lock(tmp_path / "run"):
        holder = f"process {os.getpid()} on {socket.gethostname()}"  # to open the file here would give it up
        line = f"CheckpointError: output_dir {str(tmp_path / 'run')!r} is in use: {holder} runs in it; wait for its end"
        for resume in ("never", "auto"):
            said = ranks(1).run(run, given=given, resume=resume)[0]
            assert said is not None
            assert said.startswith(line)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK], "nothing was written"


def test_a_directory_is_free_again_after_its_run(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match="its own end"), run_lock(tmp_path):
            raise CheckpointError("its own end")


@pytest.mark.parametrize("resume", ["atuo", "runs/nowhere"])
def test_a_place_to_go_on_from_that_is_not_there_is_refused_at_once(tmp_path: Path, resume: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_run_dir(tmp_path, overwrite=False, resume=resume)
    said = f"--resume must be auto, never, or the folder of a checkpoint or a run, got {resume!r}, which is no folder"
    assert str(caught.value) == said + ("; did you mean 'auto'?" if resume == "atuo" else "")


def test_whatever_differs_from_the_run_that_is_to_go_on_is_named(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    given = settings(sources, tmp_path / "run", checkpoint={"every_steps": 1}, deepspeed=numbers(2e-3))
    del given["train"]["learning_rate"]  # the DeepSpeed JSON says it
    ranks(1).run(run, given=given, signal_at=1)
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").path(2)
    going_on = "; a run goes on with the settings it began with"
    relabelled = tiny.rows(58, seed=1)
    relabelled[7]["label"] = {"positive": "negative", "negative": "positive"}[relabelled[7]["label"]]
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "epochs": ({"train": {"epochs": 3}}, f"train.epochs is 3 now and 2 in {tmp_path / 'run' / 'config.yaml'}"),
        "plan": ({"schedule": {"num_stages": 1}}, "schedule.num_stages is 1 now and None in "),
        "model": ({"model": {"path": str(tiny.save_model(tmp_path / "other", layers=3))}}, "model.path is "),
        "rate": ({"deepspeed": numbers(1e-3)}, f"learning_rate is 0.001 now and 0.002 in {checkpoint}{going_on}"),
        "precision": ({"deepspeed": numbers(2e-3, bf16=True)}, f"precision is 'bf16' now and 'fp32' in {checkpoint}"),
    }
    for name, (change, words) in changes.items():
        said = ranks(1).run(run, given={**given, **merged(given, change)}, resume="auto")[0]
        assert said is not None, name
        assert said.startswith("ConfigError: "), said
        assert words in said, said
        assert "\n" not in said
    tiny.write_csv(sources / "train.csv", relabelled)
    try:
        said = ranks(1).run(run, given=given, resume="auto")[0]
    finally:
        tiny.write_csv(sources / "train.csv", tiny.rows(58, seed=1))
    assert said is not None
    assert said.startswith("ConfigError: the training data is 58 rows with checksum ")
    assert said.endswith(f" in {checkpoint}")
    empty = tmp_path / "empty"
    empty.mkdir()
    said = ranks(1).run(run, given={**given, "output_dir": str(tmp_path / "new")}, resume=str(empty))[0]
    assert said == f"CheckpointError: {empty} is no checkpoint: it has no manifest.json"
    assert not (tmp_path / "new" / "config.yaml").exists()
    told = ranks(1).run(dry, settings=given, resume="auto")[0]
    assert f"--resume auto: would go on from {checkpoint}, after step 2" in told
    assert ranks(1).run(run, given=given, resume="auto") == [None], "and unchanged it goes on"


def numbers(rate: float, *, bf16: bool = False) -> dict[str, Any]:
    """A DeepSpeed configuration, which is free to change, with numbers, which are not."""
    return {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": rate, "torch_adam": True}},
        "bf16": {"enabled": bf16},
    }


def merged(given: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {**given.get(name, {}), **section} if name in ("train", "model", "schedule") else section
        for name, section in change.items()
    }


# ---- early stopping ------------------------------------------------------------------------------------------------


def end_before_the_export(given: dict[str, Any]) -> str | None:
    """Run until all is trained and saved, and end there."""
    from progtuning_ds.train import session
    from progtuning_ds.train.outcome import RunEndError

    def stop(self: Any, built: Any) -> None:
        raise RunEndError("the end of this process")

    export = session.Session._export
    session.Session._export = stop  # type: ignore[method-assign]
    try:
        return run(given)
    finally:
        session.Session._export = export  # type: ignore[method-assign]


@pytest.mark.parametrize("at", [5, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 9, 14))])
def test_patience_survives_a_resume(ranks: RankPools, sources: Path, tmp_path: Path, at: int) -> None:
    """Nothing is learnt, so the run ends two epochs after the first, wherever it was stopped on the way."""
    given = settings(sources, tmp_path / "run", train={"epochs": 6, "learning_rate": 1e-9, "early_stopping": 2}, **TWO)
    said = ranks(1).run(run, given=given, signal_at=at)[0]
    assert said is not None
    assert said.startswith(f"PreemptedError: stopped by SIGUSR1 after step {at + 1} of {6 * EPOCH}")
    assert ranks(1).run(run, given=given, resume="auto") == [None]
    assert [record.step for record in read_records(tmp_path / "run", StepRecord)] == list(range(3 * EPOCH))
    assert [record.step + 1 for record in read_records(tmp_path / "run", EvaluationRecord)] == [5, 10, 15]
    assert [record.total_steps for record in read_records(tmp_path / "run", RunRecord)] == [3 * EPOCH]


def test_a_run_that_had_ended_early_trains_no_further(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(sources, tmp_path / "run", train={"epochs": 6, "learning_rate": 1e-9, "early_stopping": 1}, **TWO)
    whole = {**given, "output_dir": str(tmp_path / "whole")}
    ranks(1).run(run, given=whole)
    assert ranks(1).run(end_before_the_export, given=given) == ["RunEndError: the end of this process"]
    assert not (tmp_path / "run" / "final").exists()
    assert ranks(1).run(run, given=given, resume="auto") == [None]
    assert len(read_records(tmp_path / "run", StepRecord)) == 2 * EPOCH
    same_results(tmp_path / "run", tmp_path / "whole")
