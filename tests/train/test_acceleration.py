"""torch.compile under a schedule that freezes, and what cannot be accelerated."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.train.acceleration import check_acceleration
from progtuning_ds.train.models import load_shape
from progtuning_ds.train.records import EvaluationRecord, StepRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import settings, train


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("acceleration"), 48, 11, layers=2)


def train_and_count(given: dict[str, Any]) -> dict[str, int]:
    """Train on this rank; graphs that torch compiled, and warnings that it gave up."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(given)
    counters = torch._dynamo.utils.counters
    limit = sum("recompile_limit" in str(one.message) for one in caught)
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "limit": limit,
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("deepspeed", "backend"),
    [("zero2", "aot_eager"), ("zero1", "aot_eager"), ("single_gpu", "aot_eager"), ("zero2", "inductor")],
)
def test_a_compiled_run_loses_what_an_eager_one_does(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, backend: str
) -> None:
    schedule = {"stages": [{"blocks": "0-1", "steps": 4}, {"blocks": "1", "steps": 4, "embeddings": False}]}
    both = []
    for name, extra in (("eager", {}), ("compiled", {"compile": True, "compile_backend": backend})):
        given = settings(sources, tmp_path / name, deepspeed=deepspeed, schedule=schedule, train=extra)
        given["logging"]["plot"] = False
        counts = ranks(2).run(train_and_count, given=given, timeout=1100)
        records = read_records(tmp_path / name, StepRecord)
        both.append((counts, records, read_records(tmp_path / name, EvaluationRecord)))
    (eager, records, evaluations), (compiled, ours, scores) = both
    assert all(rank["graphs"] == 0 for rank in eager)
    for rank in compiled:
        assert rank["graphs"] >= 2, "one per stage at least"
        assert (rank["breaks"], rank["limit"]) == (0, 0)
    assert [one.loss for one in ours] == pytest.approx([one.loss for one in records], abs=2e-5)
    if deepspeed != "single_gpu":  # without ZeRO and clipping, DeepSpeed computes no norm in fp32
        assert [one.grad_norm for one in ours] == pytest.approx([one.grad_norm for one in records], rel=1e-3)
    assert [one.metrics["loss"] for one in scores] == pytest.approx([o.metrics["loss"] for o in evaluations], abs=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_frozen_blocks_of_a_compiled_model_stay_as_they_are(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    schedule = {"stages": [{"blocks": "1", "steps": 8, "embeddings": False}]}
    given = settings(
        sources, tmp_path / "run", schedule=schedule, train={"compile": True, "compile_backend": "aot_eager"}
    )
    ranks(1).run(train, given=given, timeout=800)
    before = load_file(sources / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, tensor in before.items():
        frozen = name.startswith(("embeddings.", "encoder.layer.0."))
        assert torch.equal(tensor, after[f"bert.{name}"]) == frozen, name


@pytest.mark.parametrize(
    ("sections", "stage", "words"),
    [
        ({"train": {"compile": True}}, 3, "train.compile works with ZeRO stages 0, 1 and 2, got 3"),
        ({"train": {"compile": True, "compile_backend": "inducer"}}, 2, "did you mean 'inductor'?"),
        ({"model": {"liger": True}}, 2, "model.liger needs a GPU, got ranks on cpu"),
    ],
)
def test_what_cannot_be_accelerated_is_one_line(sources: Path, sections: dict, stage: int, words: str) -> None:
    given = settings(sources, sources / "run", **sections)
    config = run_config(given)
    with pytest.raises(ConfigError) as caught:
        check_acceleration(config, load_shape(config.model), "cpu", stage)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
