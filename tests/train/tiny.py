"""A random BERT of a few thousand parameters, and labelled rows it can learn. Imports no deepspeed."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "dull")
FILLER = ("the", "a", "film", "was", "very", "plot", "and", "is")


def save_model(folder: Path, *, layers: int = 4, dropout: float = 0.0) -> Path:
    """Write a model without head, with its tokenizer, as on the hub."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of different lengths; the label says which kind of word is in it."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label, words = draw.choice([("positive", GOOD), ("negative", BAD)])
        text = [*draw.choices(FILLER, k=draw.randint(1, 12)), draw.choice(words)]
        made.append({"text": " ".join(text), "label": label})
    return made


def write_csv(path: Path, data: list[dict[str, str]]) -> Path:
    """Write rows with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(data[0]))
        writer.writeheader()
        writer.writerows(data)
    return path


def save_sources(folder: Path, train: int, test: int, *, layers: int = 4, dropout: float = 0.0) -> Path:
    """A model in ``folder/model``, and ``train.csv`` and ``test.csv`` with so many rows; returns ``folder``."""
    save_model(folder / "model", layers=layers, dropout=dropout)
    write_csv(folder / "train.csv", rows(train, seed=1))
    write_csv(folder / "test.csv", rows(test, seed=2))
    return folder
