"""The loss of a step is the mean over all its tokens, however they are dealt out; against one big batch in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification, LlamaForCausalLM

from progtuning_ds.train.order import RowOrder
from progtuning_ds.train.records import StepRecord, read_records
from tests.ranks import RankPools
from tests.tasks import tiny_lm
from tests.train import tiny
from tests.train.test_run import train

ROWS, BATCH = 12, 4
TAGS = ("O", "B-GOOD", "B-BAD")


def talks() -> list[dict[str, Any]]:
    """Answers of 2 to 25 words."""
    return [
        {"talk": [{"role": "user", "content": text[:2]}, {"role": "assistant", "content": text}]}
        for text in tiny_lm.texts(ROWS, longest=25)
    ]


def tagged() -> list[dict[str, Any]]:
    """Rows of 2 to 13 words."""
    made = []
    for row in tiny.rows(ROWS, seed=5):
        words = row["text"].split()
        made.append({"tokens": words, "ner_tags": [TAGS[(w in tiny.GOOD) + 2 * (w in tiny.BAD)] for w in words]})
    return made


def save_tagger(folder: Path) -> Path:
    """A model with its head, so that plain torch starts from the same one."""
    tiny.save_model(folder, layers=2)
    words = len((folder / "vocab.txt").read_text().split())
    torch.manual_seed(0)
    BertForTokenClassification(
        BertConfig(
            vocab_size=words,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    ).save_pretrained(folder)
    return folder


def one_big_batch(kind: str, folder: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean loss over all learnt tokens of the rows, each alone through the model, and the norm of its gradient."""
    total, count = torch.zeros(()), 0
    if kind == "chat":
        model: nn.Module = LlamaForCausalLM.from_pretrained(folder)
        words = tiny_lm.tokenizer()
        for row in rows:
            prompt = words(words.apply_chat_template(row["talk"][:1], tokenize=False, add_generation_prompt=True))
            whole = torch.tensor(words(words.apply_chat_template(row["talk"], tokenize=False))["input_ids"])
            begin = len(prompt["input_ids"])
            scores = model(input_ids=whole[None]).logits[0].log_softmax(-1)
            total = total - scores[begin - 1 : -1].gather(1, whole[begin:, None]).sum()
            count += len(whole) - begin
    else:
        model = BertForTokenClassification.from_pretrained(folder)
        vocabulary = {word: at for at, word in enumerate((folder / "vocab.txt").read_text().split())}
        names = sorted({tag for row in tagged() for tag in row["ner_tags"]}, key=lambda name: (name != "O", name))
        for row in rows:
            ids = [vocabulary[word] for word in ("[CLS]", *row["tokens"], "[SEP]")]
            scores = model(input_ids=torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
            tags = torch.tensor([names.index(tag) for tag in row["ner_tags"]])
            total = total - scores.gather(1, tags[:, None]).sum()
            count += len(tags)
    loss = total / count
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(squares).sum().sqrt().item()


@pytest.mark.parametrize("kind", ["chat", "tags"])
def test_a_step_is_the_mean_over_its_tokens_on_any_ranks(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    rows, folder = (talks(), tmp_path / "model") if kind == "chat" else (tagged(), tmp_path / "model")
    (tiny_lm.save_model if kind == "chat" else save_tagger)(folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "causal_lm", "messages_column": "talk", "max_length": 60}
    given = {
        "model": {"path": str(folder)},
        "data": {"train_file": str(tmp_path / "rows.jsonl"), "validation_file": str(tmp_path / "rows.jsonl")},
        "task": task if kind == "chat" else {"kind": "token_classification"},
        "train": {"epochs": 2, "global_batch_size": BATCH, "group_by_length": False, "learning_rate": 5e-3},
        "logging": {"progress": "off", "plot": False},
    }
    told = []
    for world_size, micro in ((1, 4), (2, 1)):  # one pass; two passes on each of two ranks
        run = {**given, "output_dir": str(tmp_path / f"run{world_size}")}
        ranks(world_size).run(train, given={**run, "train": {**given["train"], "micro_batch_size": micro}})
        told.append(read_records(tmp_path / f"run{world_size}", StepRecord))
    loss, norm = one_big_batch(kind, folder, [rows[index] for index in RowOrder(ROWS, BATCH, 0).epoch(0)[0]])
    for records in told:
        assert records[0].loss == pytest.approx(loss, rel=1e-5)
        assert records[0].grad_norm == pytest.approx(norm, rel=1e-4)
    assert [record.loss for record in told[1]] == pytest.approx([record.loss for record in told[0]], rel=1e-5)
    assert [record.grad_norm for record in told[1]] == pytest.approx([r.grad_norm for r in told[0]], rel=1e-4)
