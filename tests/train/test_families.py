"""Every kind of task as a user starts it, each on another model, another kind of file and other options together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModel,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    MistralConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from progtuning_ds.train.records import RunRecord, StageRecord, StepRecord, read_records
from tests.tasks import tiny_lm
from tests.tasks.test_glue import official
from tests.tasks.test_squad import made
from tests.tasks.test_squad import official as official_squad
from tests.train import tiny
from tests.train.test_launch import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORDS = 5 + len(tiny.GOOD) + len(tiny.BAD) + len(tiny.FILLER)
ENCODER = {"vocab_size": WORDS, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}


def save_encoder(folder: Path, config: PreTrainedConfig) -> str:
    """A random model of another kind beside the tokenizer of the tiny BERT."""
    tiny.save_model(folder)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def save_decoder(folder: Path, config: PreTrainedConfig) -> str:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return str(folder)


def run(folder: Path, given: dict[str, Any], *options: str) -> tuple[RunRecord, list[StageRecord], list[StepRecord]]:
    base = {"train": {"epochs": 2, "global_batch_size": 8, "learning_rate": 1e-2}, "output_dir": str(folder / "run")}
    given = {**given, **base, "train": {**base["train"], **given.get("train", {})}}
    (folder / "run.yaml").write_text(yaml.safe_dump(given))
    done = launch("launch/train.py", "--config", str(folder / "run.yaml"), *options, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    out = folder / "run" if "--seeds" not in options else folder / "run" / "seed-1"
    (record,) = read_records(out, RunRecord)
    assert record.world_size == 2
    assert 0 <= record.metrics["validation"][record.main_metric] <= 100
    return record, read_records(out, StageRecord), read_records(out, StepRecord)


def test_packed_text_of_mistral_in_parquet_under_zero3(tmp_path: Path) -> None:
    words = tiny_lm.config().vocab_size
    config = MistralConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
    )
    Dataset.from_dict({"story": tiny_lm.texts(120)}).to_parquet(tmp_path / "train.parquet")
    given = {
        "model": {"path": save_decoder(tmp_path / "model", config), "gradient_checkpointing": True},
        "data": {"train_file": str(tmp_path / "train.parquet"), "validation_fraction": 0.1},
        "task": {"kind": "causal_lm", "text_column": "story", "max_length": 48},
        "schedule": {"num_stages": 3, "embeddings": "first_stage"},
        "train": {"precision": "bf16", "micro_batch_size": 2, "boundary_warmup_steps": 2, "stage_lr_factor": 0.9},
        "deepspeed": "zero3",
    }
    record, stages, steps = run(tmp_path, given)
    assert record.precision == "bf16"
    assert [stage.embeddings for stage in stages] == [True, False, False]
    assert steps[-1].loss < steps[0].loss - 0.3, "words follow each other in order"


def test_conversations_of_gpt2_in_json(tmp_path: Path) -> None:
    words = tiny_lm.config().vocab_size
    config = GPT2Config(
        vocab_size=words, n_embd=16, n_layer=3, n_head=2, n_positions=96, eos_token_id=2, bos_token_id=2
    )
    talks = [
        {"talk": [{"role": "user", "content": text[:2]}, {"role": "assistant", "content": text}]}
        for text in tiny_lm.texts(60)
    ]
    (tmp_path / "train.json").write_text(json.dumps(talks))
    given = {
        "model": {"path": save_decoder(tmp_path / "model", config)},
        "data": {"train_file": str(tmp_path / "train.json"), "validation_fraction": 0.2},
        "task": {"kind": "causal_lm", "messages_column": "talk", "max_length": 80},
        "train": {"micro_batch_size": 1, "early_stopping": 5},
    }
    _, stages, steps = run(tmp_path, given)
    assert len(stages) == 2
    assert steps[-1].loss < steps[0].loss - 0.3


def test_classes_of_distilbert_in_csv_with_seeds(tmp_path: Path) -> None:
    config = DistilBertConfig(
        vocab_size=WORDS, dim=16, n_layers=4, n_heads=2, hidden_dim=24, max_position_embeddings=32
    )
    tiny.write_csv(tmp_path / "train.csv", tiny.rows(200))
    given = {
        "model": {"path": save_encoder(tmp_path / "model", config)},
        "data": {"train_file": str(tmp_path / "train.csv"), "validation_fraction": 0.2},
        "schedule": {"embeddings": "never"},
        "train": {"epochs": 4},
        "deepspeed": "zero1",
    }
    run(tmp_path, given, "--seeds", "1,2")
    told = json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert [one["diverged"] for one in told["seeds"]] == [None, None]
    spread = told["spread"]["validation"]["accuracy"]
    assert spread["lowest"] <= spread["mean"] <= spread["highest"]


def test_glue_of_roberta_in_official_files(tmp_path: Path) -> None:
    config = RobertaConfig(**ENCODER, num_hidden_layers=4, max_position_embeddings=34)
    given = {
        "model": {"path": save_encoder(tmp_path / "model", config)},
        "data": {"source": str(official(tmp_path / "glue", "rte", rows=21))},
        "task": {"kind": "glue", "name": "rte", "max_length": 31},
        "train": {"micro_batch_size": 2, "learning_rate": 1e-3},
    }
    run(tmp_path, given)
    lines = (tmp_path / "run" / "submission" / "RTE.tsv").read_text().splitlines()
    assert len(lines) == 22
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}


def test_squad_v2_of_electra_in_official_json(tmp_path: Path) -> None:
    config = ElectraConfig(**ENCODER, embedding_size=16, num_hidden_layers=4, max_position_embeddings=32)
    for name, count in (("train", 60), ("dev", 23)):
        official_squad(tmp_path / f"{name}.json", made(count, count, unanswerable=True))
    given = {
        "model": {"path": save_encoder(tmp_path / "model", config)},
        "data": {"train_file": str(tmp_path / "train.json"), "validation_file": str(tmp_path / "dev.json")},
        "task": {"kind": "squad", "unanswerable": True, "max_length": 24, "stride": 8},
        "train": {"group_by_length": True},
    }
    record, _, _ = run(tmp_path, given)
    assert {"exact", "f1", "best_f1", "best_threshold", "has_answer_f1", "no_answer_f1"} <= set(
        record.metrics["validation"]
    )


def test_entities_of_mpnet_in_a_saved_folder_under_zero3(tmp_path: Path) -> None:
    config = MPNetConfig(**ENCODER, num_hidden_layers=4, max_position_embeddings=34)
    rows = []
    for row in tiny.rows(160, seed=3):
        words = row["text"].split()
        rows.append({"tokens": words, "ner_tags": ["B-GOOD" if word in tiny.GOOD else "O" for word in words]})
    DatasetDict(train=Dataset.from_list(rows[:120]), validation=Dataset.from_list(rows[120:])).save_to_disk(
        tmp_path / "data"
    )
    given = {
        "model": {"path": save_encoder(tmp_path / "model", config)},
        "data": {"source": str(tmp_path / "data")},
        "task": {"kind": "token_classification", "max_length": 12},
        "train": {"epochs": 4, "micro_batch_size": 2},
        "deepspeed": "zero3",
    }
    record, stages, _ = run(tmp_path, given)
    assert len(stages) == 4
    assert record.metrics["validation"]["accuracy"] > 0.9
