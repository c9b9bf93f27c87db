"""Whole runs of a tiny model on live ranks: training, records, export."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from progtuning_ds.config import load_run_config, run_config
from progtuning_ds.train.records import (
    EvaluationRecord,
    RunRecord,
    StageRecord,
    StepRecord,
    read_records,
)
from tests.ranks import RankPools
from tests.train import tiny

TRAIN_ROWS, TEST_ROWS = 58, 23
LABELS = ("negative", "positive")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("sources"), TRAIN_ROWS, TEST_ROWS)


def settings(sources: Path, output: Path, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": {"path": str(sources / "model")},
        "data": {"train_file": str(sources / "train.csv"), "validation_file": str(sources / "test.csv")},
        "train": {"epochs": 2, "global_batch_size": 12, "micro_batch_size": 2, "learning_rate": 5e-3},
        "logging": {"progress": "off"},
        "output_dir": str(output),
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return base


def train(given: dict[str, Any], compare: bool = False) -> None:
    """Run the program on this rank."""
    from progtuning_ds.train.quiet import quiet_libraries

    config = run_config(given)
    quiet_libraries(config.logging)
    from progtuning_ds.train.program import run_program

    run_program(config, compare=compare)


def reloaded_score(folder: Path) -> tuple[float, float]:
    """`score` of the exported model, loaded by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    assert model.config.id2label == dict(enumerate(LABELS))
    return score(model, folder)


def score(model: Any, folder: Path) -> tuple[float, float]:
    """Accuracy and mean loss of a model on the rows for validation, one at a time, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    model.eval()
    right, losses = 0, []
    for row in tiny.rows(TEST_ROWS, seed=2):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].float()
        label = LABELS.index(row["label"])
        losses.append(-logits.log_softmax(0)[label].item())
        right += int(logits.argmax()) == label
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in (folder / "final").iterdir())
    return right / TEST_ROWS, sum(losses) / TEST_ROWS


@pytest.mark.parametrize(
    ("deepspeed", "precision", "tolerance"),
    [
        ("single_gpu", "fp32", 1e-5),
        ("zero1", "fp32", 1e-5),
        ("zero2", "fp32", 1e-5),
        ("zero3", "fp32", 1e-5),
        ("zero2_offload", "fp32", 1e-5),
        ("zero2", "bf16", 2e-2),
        ("zero3", "bf16", 2e-2),
    ],
)
def test_the_exported_model_predicts_what_the_engine_did(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, precision: str, tolerance: float
) -> None:
    given = settings(sources, tmp_path / "run", deepspeed=deepspeed, train={"precision": precision})
    # The first offload on a machine compiles DeepSpeed's CPU Adam.
    ranks(2).run(train, given=given, timeout=280)
    last = read_records(tmp_path / "run", EvaluationRecord)[-1]
    accuracy, loss = reloaded_score(tmp_path / "run")
    assert loss == pytest.approx(last.metrics["loss"], abs=tolerance)
    if precision == "fp32":
        assert accuracy == pytest.approx(last.metrics["accuracy"])
    assert last.reasons == ("epoch", "stage", "end")
    assert last.rows == TEST_ROWS


def test_losses_do_not_depend_on_ranks_or_micro_batch(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    runs = {(1, 12): "a", (1, 3): "b", (2, 2): "c", (3, 4): "d"}
    losses, scores = [], []
    for (world_size, micro), name in runs.items():
        given = settings(sources, tmp_path / name, deepspeed="zero2", train={"micro_batch_size": micro})
        ranks(world_size).run(train, given=given)
        losses.append([record.loss for record in read_records(tmp_path / name, StepRecord)])
        scores.append([record.metrics["loss"] for record in read_records(tmp_path / name, EvaluationRecord)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-5)
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=2e-5)


def test_records_tell_the_whole_run(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(sources, tmp_path, schedule={"num_stages": 4}, logging={"progress": "off", "steps": 3})
    ranks(2).run(train, given=given)
    steps, stages = read_records(tmp_path, StepRecord), read_records(tmp_path, StageRecord)
    evaluations, (run,) = read_records(tmp_path, EvaluationRecord), read_records(tmp_path, RunRecord)

    per_epoch = -(-TRAIN_ROWS // 12)
    assert [record.step for record in steps] == list(range(2 * per_epoch))
    assert [record.epoch for record in steps] == [(step + 1) / per_epoch for step in range(2 * per_epoch)]
    assert max(record.learning_rate for record in steps) <= 5e-3
    assert all(record.grad_norm > 0 and record.memory_bytes > 0 for record in steps)

    # A boundary in mid-epoch, one at an epoch's end: each step is evaluated at most once, for all its reasons.
    boundaries = [round(2 * per_epoch * stage / 4) for stage in (1, 2, 3, 4)]
    assert [(record.step + 1, record.reasons) for record in evaluations] == [
        (boundaries[0], ("stage",)),
        (boundaries[1], ("epoch", "stage")),
        (boundaries[2], ("stage",)),
        (boundaries[3], ("epoch", "stage", "end")),
    ]
    assert [stage.metrics for stage in stages] == [record.metrics for record in evaluations]

    assert [stage.trainable_blocks for stage in stages] == [(0, 1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    assert sum(stage.steps for stage in stages) == 2 * per_epoch
    for before, after in pairwise(stages):
        fell = {name: before.memory[name] - after.memory[name] for name in before.memory}
        assert after.released_bytes == fell
        assert after.moved_bytes == 0, "a planned boundary"
        assert before.state_bytes_per_rank[0] - after.state_bytes_per_rank[0] == sum(fell.values()) > 0
    # fp32 master and two moments of every trainable parameter, over two ranks, but for alignment.
    for stage in stages:
        assert sum(stage.state_bytes_per_rank) == pytest.approx(12 * stage.trainable_params, rel=0.05)

    updated = sum(stage.trainable_params * stage.steps for stage in stages)
    assert run.updated_params == pytest.approx(updated / per_epoch, abs=1)
    assert run.updated_params_full == 2 * stages[0].trainable_params
    assert run.metrics["validation"] == evaluations[-1].metrics

    assert load_run_config(tmp_path / "config.yaml") == run_config(given)
    assert json.loads((tmp_path / "deepspeed.json").read_text())["train_batch_size"] == 12
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_compare_trains_the_same_budget_without_freezing(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(sources, tmp_path, deepspeed="zero3")
    ranks(2).run(train, given=given, compare=True)
    (ours,), (full,) = (read_records(folder, RunRecord) for folder in (tmp_path, tmp_path / "full"))
    assert (ours.kind, full.kind) == ("progtuning", "full fine-tuning")
    assert full.saving == 0 < ours.saving
    assert full.updated_params == ours.updated_params_full
    assert full.total_steps == ours.total_steps

    def losses(folder: Path) -> list[float]:
        return [record.loss for record in read_records(folder, StepRecord)]

    boundary = read_records(tmp_path, StageRecord)[1].first_step
    # The first step after the boundary still sees the same weights; then only one of them has frozen blocks.
    assert losses(tmp_path)[: boundary + 1] == pytest.approx(losses(tmp_path / "full")[: boundary + 1], abs=1e-6)
    assert losses(tmp_path)[boundary + 1 :] != pytest.approx(losses(tmp_path / "full")[boundary + 1 :], abs=1e-6)
    assert set(json.loads((tmp_path / "comparison.json").read_text())) == {"progtuning", "full fine-tuning"}
    assert reloaded_score(tmp_path / "full")[1] == pytest.approx(full.metrics["validation"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "sections",
    [
        {"schedule": {"embeddings": "never"}, "model": {"gradient_checkpointing": True}},
        {"schedule": {"embeddings": "first_stage", "always_train": ["*LayerNorm*"]}},
        {"schedule": {"stages": [{"blocks": "2-3", "steps": 4}, {"blocks": "0,3", "steps": 6}]}},
        {"train": {"lr_scheduler_type": "cosine", "group_by_length": False}, "task": {"max_length": 6}},
    ],
    ids=["embeddings-never", "always-train", "custom-stages", "cosine"],
)
def test_options_train_to_the_end(ranks: RankPools, sources: Path, tmp_path: Path, sections: dict) -> None:
    given = settings(sources, tmp_path, **sections)
    ranks(2).run(train, given=given)
    assert read_records(tmp_path, RunRecord)[0].total_steps == len(read_records(tmp_path, StepRecord)) == 10


def test_frozen_tensors_leave_as_they_came(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(sources, tmp_path, schedule={"embeddings": "never", "stages": [{"blocks": "2-3", "steps": 10}]})
    given["schedule"]["stages"][0]["embeddings"] = False
    ranks(2).run(train, given=given)
    from safetensors.torch import load_file

    before = load_file(sources / "model" / "model.safetensors")
    after = load_file(tmp_path / "final" / "model.safetensors")
    for name, tensor in before.items():
        frozen = name.startswith(("embeddings.", "encoder.layer.0.", "encoder.layer.1."))
        assert torch.equal(tensor, after[f"bert.{name}"]) == frozen, name


def test_a_mistake_in_the_data_is_told_before_any_weight_is_loaded(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (sources / "model").iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    given = settings(sources, tmp_path / "run", model={"path": str(bare)}, task={"text_column": "texts"})
    with pytest.raises(AssertionError, match=r"task\.text_column must be one of text, label"):
        ranks(2).run(train, given=given)
    assert not (tmp_path / "run").exists()
