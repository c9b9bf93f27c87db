"""Budgets stop a run before it fails, and freed memory is spent without changing what is learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from progtuning_ds.train.records import MemoryRecord, StepRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import settings, train

ROWS = 48  # a multiple of the 12 rows of a step


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("memory-sources"), ROWS, 12)


def refused(given: dict[str, Any]) -> str:
    """What this rank says to settings that it refuses."""
    from progtuning_ds.errors import ConfigError

    try:
        train(given)
    except ConfigError as error:
        return str(error)
    raise AssertionError("the run was not refused")


def train_short_of_memory(given: dict[str, Any], most_rows: int) -> None:
    """The run, on a rank whose allocator really refuses memory for more than ``most_rows`` rows per pass."""
    from progtuning_ds.tasks.classification import ClassificationTask

    original = ClassificationTask.loss

    def loss(self: Any, model: Any, batch: Any) -> torch.Tensor:
        if next(iter(batch.values())).shape[0] > most_rows:
            torch.empty(2**52)
        return original(self, model, batch)

    ClassificationTask.loss = loss
    try:
        train(given)
    finally:
        ClassificationTask.loss = original


def losses(folder: Path) -> list[float]:
    return [record.loss for record in read_records(folder, StepRecord)]


def passes(folder: Path) -> list[tuple[int, int, bool]]:
    return [(r.micro_batch, r.accumulation, r.fell_back) for r in read_records(folder, MemoryRecord)]


def run(
    ranks: RankPools, sources: Path, folder: Path, *, function: Any = train, extra: Any = None, **memory: Any
) -> Path:
    given = settings(
        sources,
        folder,
        schedule={"num_stages": 2},
        train={"epochs": 2, "global_batch_size": 12, "micro_batch_size": 2},
        memory=memory,
        deepspeed="zero2",
    )
    ranks(2).run(function, given=given, **(extra or {}))
    return folder


def test_a_larger_micro_batch_changes_nothing_that_is_learnt(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    plain = run(ranks, sources, tmp_path / "plain")
    planned = run(ranks, sources, tmp_path / "planned", micro_batch_sizes=[2, 6])
    spent = run(ranks, sources, tmp_path / "spent", budget="64GB", reinvest="micro_batch")
    assert passes(plain) == [(2, 3, False), (2, 3, False)]
    assert passes(planned) == passes(spent) == [(2, 3, False), (6, 1, False)]
    for other in (planned, spent):
        assert losses(other) == pytest.approx(losses(plain), abs=2e-5)


def test_memory_that_runs_out_costs_the_enlargement_and_nothing_else(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    plain = run(ranks, sources, tmp_path / "plain")
    short = run(
        ranks,
        sources,
        tmp_path / "short",
        function=train_short_of_memory,
        extra={"most_rows": 5},
        budget="64GB",
        reinvest="micro_batch",
    )
    assert passes(short) == [(2, 3, False), (2, 3, True)]
    assert losses(short) == pytest.approx(losses(plain), abs=2e-5)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"budget": "200MB", "reserve": "199MB"}, "stage 1/2 is predicted to need"),
        ({"budget": "1MB"}, "memory.budget must be above the reserve"),
        ({"micro_batch_sizes": [2]}, "one size for each of the 2 stages, got [2]"),
        ({"micro_batch_sizes": [2, 4]}, "must divide the 6 rows of a step on each rank, got 4; nearest: 3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    ranks: RankPools, sources: Path, tmp_path: Path, memory: dict[str, Any], words: str
) -> None:
    given = settings(
        sources,
        tmp_path / "run",
        schedule={"num_stages": 2},
        train={"epochs": 2, "global_batch_size": 12, "micro_batch_size": 2},
        memory=memory,
        deepspeed={"zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000}},
    )
    for said in ranks(2).run(refused, given=given):
        assert words in said
        assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_predicted_states_are_those_that_the_run_measured(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    folder = run(ranks, sources, tmp_path / "run", budget="64GB")
    records = read_records(folder, MemoryRecord)
    assert [record.stage for record in records] == [0, 1]
    for record in records:
        for name in ("weights", "master_weights", "exp_avg", "exp_avg_sq"):
            assert record.predicted[name] == record.measured[name] > 0
        assert record.measured_peak > 0
        assert record.budget == 64 * 10**9


def run_with_moments(ranks: RankPools, sources: Path, folder: Path, deepspeed: str, **memory: Any) -> Path:
    given = settings(
        sources,
        folder,
        schedule={"num_stages": 2},
        train={"epochs": 2, "global_batch_size": 12, "micro_batch_size": 6},
        memory=memory,
        deepspeed=deepspeed,
    )
    ranks(2).run(train, given=given)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
def test_moments_that_wait_elsewhere_change_no_bit(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str
) -> None:
    here = run_with_moments(ranks, sources, tmp_path / "here", deepspeed)
    for number, memory in enumerate(
        [
            {"host_state": "lowest_part"},
            {"host_state": "all"},
            {"host_state": "all", "reinvest": "unoffload", "budget": "64GB"},
        ]
    ):
        away = run_with_moments(ranks, sources, tmp_path / f"away{number}", deepspeed, **memory)
        assert losses(away) == losses(here)
        first, second = read_records(away, MemoryRecord)
        if "reinvest" in memory:
            assert not first.predicted_host  # there is room from the start
        else:
            assert first.predicted_host["exp_avg"] > 0
        assert bool(second.predicted_host) == (memory == {"host_state": "all"})


@pytest.mark.parametrize(
    ("deepspeed", "sections", "words"),
    [
        ("zero2_offload", {}, "deepspeed offloads the optimizer already"),
        ("single_gpu", {}, "ZeRO stage 0"),
        ("zero2", {"optimizer": {"kernel": "reference"}}, "optimizer.kernel reference"),
    ],
)
def test_moments_cannot_wait_everywhere(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, sections: dict[str, Any], words: str
) -> None:
    given = settings(sources, tmp_path / "run", memory={"host_state": "all"}, deepspeed=deepspeed, **sections)
    for said in ranks(2).run(refused, given=given):
        assert "memory.host_state must be none here, got all" in said
        assert words in said


def paged() -> list[int]:
    """Bytes of moments that are away after a step, after they came home, and whether they came home whole."""
    from progtuning_ds.train.host_state import HostMoments

    weights = [torch.nn.Parameter(torch.ones(300_000)) for _ in range(2)]
    groups = [{"params": [p], "name": f"part{i}.decay"} for i, p in enumerate(weights)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    adapter: Any = SimpleNamespace(torch_optimizer=optimizer, wrapper=SimpleNamespace())
    away = HostMoments(adapter, 3)
    away.keep_away([0])
    for p in weights:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    seen = [away.waiting_bytes(), away.keep_away([]), away.waiting_bytes()]
    home, never_away = (optimizer.state[p]["exp_avg"] for p in weights)
    return [*seen, int(torch.equal(home, never_away))]


def test_moments_come_home_whole() -> None:
    assert paged() == [2 * 4 * 300_000, 2 * 4 * 300_000, 0, 1]
