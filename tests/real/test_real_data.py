"""Real pretrained models on real text end clearly above where they began; started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from progtuning_ds.assets import PRIVACY_PAIRS, SHAKESPEARE, ensure_asset
from progtuning_ds.train.records import EvaluationRecord, RunRecord, StageRecord, read_records
from tests.ranks import RankPools
from tests.real.sources import smollm2_dir, untuned_scores
from tests.train.test_launch import ROOT, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


def run(
    given: dict[str, Any], folder: Path, *, alone: bool = False
) -> tuple[RunRecord, list[StageRecord], list[EvaluationRecord]]:
    """Write the configuration and start `launch/train.py` on it, on two ranks or without a launcher."""
    (folder / "run.yaml").write_text(yaml.safe_dump({**given, "output_dir": str(folder / "run")}))
    command = ["launch/train.py", "--config", str(folder / "run.yaml")]
    if alone:
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=5000
        )
    else:
        done = launch(*command, timeout=5000)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = read_records(folder / "run", RunRecord)
    return record, read_records(folder / "run", StageRecord), read_records(folder / "run", EvaluationRecord)


def test_sentiment_of_movie_reviews(ranks: RankPools, tmp_path: Path) -> None:
    given = {"model": {"path": "demo"}, "data": {"source": "demo", "max_train_samples": 1200, "max_eval_samples": 800}}
    given["train"] = {"epochs": 2, "learning_rate": 1e-4}
    before = ranks(1).run(untuned_scores, given=given, timeout=1200)[0]
    record, stages, _ = run(given, tmp_path)
    after = record.metrics["validation"]
    # The standard error at 800 rows is 1.5 points.
    assert before["accuracy"] < 0.6
    assert after["accuracy"] > 0.74
    assert after["loss"] < before["loss"] - 0.1
    assert stages[0].state_bytes_per_rank[0] > stages[1].state_bytes_per_rank[0]


def test_whether_a_clause_answers_a_question(ranks: RankPools, tmp_path: Path) -> None:
    folder = ensure_asset(PRIVACY_PAIRS)
    given = {
        "model": {"path": "demo"},
        "data": {
            "train_file": str(folder / "train.jsonl"),
            "validation_file": str(folder / "validation.jsonl"),
            "max_train_samples": 3000,
        },
        "task": {"text_column": "question", "pair_column": "clause", "max_length": 96},
        "train": {"epochs": 2, "learning_rate": 1e-4},
    }
    before = ranks(1).run(untuned_scores, given=given, timeout=1200)[0]
    record, _, _ = run(given, tmp_path)
    after = record.metrics["validation"]
    # No clause of the validation rows was seen in training. The standard error at 1,005 rows is 1.6 points.
    assert before["accuracy"] < 0.55
    assert after["accuracy"] > before["accuracy"] + 0.08
    assert after["accuracy"] > 0.58


def test_a_language_model_learns_shakespeare(ranks: RankPools, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads the model's file; pip install gguf")
    folder = ensure_asset(SHAKESPEARE)
    given = {
        "model": {"path": str(smollm2_dir())},
        "data": {
            "train_file": str(folder / "train.jsonl"),
            "validation_file": str(folder / "validation.jsonl"),
            "max_train_samples": 32,
            "max_eval_samples": 12,
        },
        "task": {"kind": "causal_lm", "max_length": 96},
        "schedule": {"num_stages": 2, "embeddings": "first_stage"},
        "train": {"epochs": 1, "global_batch_size": 4, "eval_batch_size": 4, "learning_rate": 1e-4},
        "checkpoint": {"every_epochs": 0, "at_stage_end": False},
        "logging": {"plot": False},
    }
    before = ranks(1).run(untuned_scores, given=given, timeout=2400)[0]
    record, stages, _ = run(given, tmp_path, alone=True)  # in half the memory of two ranks
    after = record.metrics["validation"]
    assert 20 <= record.total_steps <= 40
    assert before["loss"] > 4.0
    assert after["loss"] < before["loss"] - 0.3
    assert after["token_accuracy"] > before["token_accuracy"] + 0.02
    assert stages[1].trainable_params < 0.5 * stages[0].trainable_params, "half the blocks, and no embeddings"
