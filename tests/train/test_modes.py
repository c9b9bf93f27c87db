"""Ways to start the program that are not one whole run: a dry run, several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.train.cli import main
from progtuning_ds.train.outcome import GuardStopError
from progtuning_ds.train.records import EvaluationRecord, SessionRecord, read_records
from progtuning_ds.train.seeds import parse_seeds, run_seeds, seed_configs, spreads
from tests.ranks import RankPools
from tests.train import tiny


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("modes")
    tiny.save_model(folder / "model", layers=2)
    tiny.write_csv(folder / "train.csv", tiny.rows(24, seed=1))
    tiny.write_csv(folder / "test.csv", tiny.rows(11, seed=2))
    return {
        "model": {"path": str(folder / "model")},
        "data": {"train_file": str(folder / "train.csv"), "validation_file": str(folder / "test.csv")},
        "train": {"epochs": 2, "global_batch_size": 8, "learning_rate": 5e-3},
        "logging": {"progress": "off", "plot": False},
    }


def train_seeds(settings: dict[str, Any], seeds: list[int], resume: str = "never") -> None:
    from progtuning_ds.train.program import run_with_seeds

    run_with_seeds(run_config(settings), seeds, resume=resume)


def dry(settings: dict[str, Any], resume: str = "never") -> str:
    import contextlib
    import io

    from progtuning_ds.train.program import run_dry

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_dry(run_config(settings), resume=resume)
    return out.getvalue()


def test_a_dry_run_shows_the_plan_and_a_batch_and_writes_nothing(
    ranks: RankPools, tmp_path: Path, given: dict[str, Any]
) -> None:
    first, second = ranks(2).run(dry, settings={**given, "output_dir": str(tmp_path / "run")})
    assert "1/2" in first
    assert "2/2" in first
    assert "input_ids (4," in first
    assert "labels (4,)" in first
    assert second == ""
    assert not (tmp_path / "run").exists()


def test_seeds_differ_and_their_spread_is_told(ranks: RankPools, tmp_path: Path, given: dict[str, Any]) -> None:
    settings = {**given, "output_dir": str(tmp_path)}
    ranks(2).run(train_seeds, settings=settings, seeds=[3, 5])
    losses = [read_records(tmp_path / f"seed-{seed}", EvaluationRecord)[-1].metrics["loss"] for seed in (3, 5)]
    assert losses[0] != losses[1]
    told = json.loads((tmp_path / "seeds.json").read_text())
    assert [one["seed"] for one in told["seeds"]] == [3, 5]
    spread = told["spread"]["validation"]["loss"]
    assert spread["mean"] == pytest.approx(np.mean(losses))
    assert spread["deviation"] == pytest.approx(np.std(losses, ddof=1))
    assert [spread["lowest"], spread["highest"]] == sorted(losses)
    ranks(2).run(train_seeds, settings=settings, seeds=[3, 5], resume="auto")  # complete: nothing to do


def stop_in_the_second_seed(settings: dict[str, Any], seeds: list[int]) -> str:
    """SIGUSR1 comes in the second step of the second seed."""
    import os
    import signal

    from progtuning_ds.train import loop
    from progtuning_ds.train.outcome import PreemptedError

    train_step = loop.TrainingLoop._train_step

    def signalled(self: Any, step: int, *rest: Any) -> None:
        if (self.job.config.train.seed, step) == (seeds[1], 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        train_step(self, step, *rest)

    loop.TrainingLoop._train_step = signalled  # type: ignore[method-assign]
    try:
        train_seeds(settings, seeds)
    except PreemptedError as error:
        return str(error)
    finally:
        loop.TrainingLoop._train_step = train_step  # type: ignore[method-assign]
    return ""


@pytest.mark.slow
def test_seeds_go_on_where_they_were(ranks: RankPools, tmp_path: Path, given: dict[str, Any]) -> None:
    whole, stopped = ({**given, "output_dir": str(tmp_path / name)} for name in ("whole", "stopped"))
    ranks(2).run(train_seeds, settings=whole, seeds=[3, 5, 7])
    said = ranks(2).run(stop_in_the_second_seed, settings=stopped, seeds=[3, 5, 7])
    assert said[0].startswith("stopped by SIGUSR1 after step 2 of ")
    assert not (tmp_path / "stopped" / "seed-7").exists()
    ranks(2).run(train_seeds, settings=stopped, seeds=[3, 5, 7], resume="auto")
    sessions = {seed: len(read_records(tmp_path / "stopped" / f"seed-{seed}", SessionRecord)) for seed in (3, 5, 7)}
    assert sessions == {3: 1, 5: 2, 7: 1}
    assert (tmp_path / "stopped" / "seeds.json").read_text() == (tmp_path / "whole" / "seeds.json").read_text()


def test_a_seed_that_diverges_does_not_end_the_others(given: dict[str, Any]) -> None:
    def train(config: Any) -> dict[str, dict[str, float]]:
        if config.train.seed == 1:
            raise GuardStopError("the loss is not a number")
        return {"validation": {"accuracy": 0.5 + config.train.seed}}

    results = run_seeds(seed_configs(run_config(given), [0, 1, 2]), train)
    assert [result.diverged for result in results] == [None, "the loss is not a number", None]
    assert spreads(results)["validation"]["accuracy"].mean == 1.5
    assert spreads(results[1:2]) == {}


@pytest.mark.parametrize("text", ["", "a", "0,,1", "1,1", "-1"])
def test_seeds_must_be_different_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds must be different whole numbers such as 0,1,2"):
        parse_seeds(text)


def test_modes_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "demo", "--dry-run", "--seeds", "0,1"]) == 2
    assert "--dry-run and --seeds do not go together" in capsys.readouterr().err
