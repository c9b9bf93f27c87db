"""A run that nothing happens to, for every ZeRO stage under test, and how often it passed each point."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.faults.launch import launch
from tests.train import tiny


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run."""

    folder: Path
    passages: dict[str, int]


@dataclass(frozen=True)
class Bench:
    """Sources of a run, and the arguments that start it."""

    sources: Path
    whole: Callable[[str], Whole]

    def arguments(self, output: Path, deepspeed: str, *more: str) -> list[str]:
        """The command line of a run into a directory."""
        return ["--config", str(self.sources / "run.yaml"), f"deepspeed={deepspeed}", f"output_dir={output}", *more]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Ten steps in three stages, saved every second step."""
    sources = tmp_path_factory.mktemp("sources")
    tiny.save_model(sources / "model", layers=3, dropout=0.1)
    tiny.write_csv(sources / "train.csv", tiny.rows(58, seed=1))
    tiny.write_csv(sources / "test.csv", tiny.rows(9, seed=2))
    config = {
        "model": {"path": str(sources / "model")},
        "data": {"train_file": str(sources / "train.csv"), "validation_file": str(sources / "test.csv")},
        "train": {"epochs": 2, "global_batch_size": 12, "micro_batch_size": 3, "learning_rate": 5e-3},
        "schedule": {"num_stages": 3},
        "checkpoint": {"every_steps": 2},
        "logging": {"progress": "off", "plot": False, "steps": 1},
    }
    (sources / "run.yaml").write_text(yaml.safe_dump(config))

    @functools.cache
    def whole(deepspeed: str) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        counts = folder / "passages.json"
        ended = launch(bench.arguments(folder / "run", deepspeed), folder, count_into=counts)
        assert ended.codes == (0, 0), ended.said
        return Whole(folder / "run", json.loads(counts.read_text()))

    bench = Bench(sources, whole)
    return bench
