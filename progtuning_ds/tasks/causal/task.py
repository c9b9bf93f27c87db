"""The causal language modelling task: rows, batches, loss and perplexity. Imports torch; no deepspeed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from progtuning_ds.config import CausalConfig, RunConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.base import Batch, EncodedRows
from progtuning_ds.tasks.causal.chat import IGNORED, check_chat, check_messages, encode_chat
from progtuning_ds.tasks.causal.leaks import check_no_leak
from progtuning_ds.tasks.causal.packing import pack, pieces
from progtuning_ds.tasks.columns import require_column, require_text
from progtuning_ds.tasks.lengths import usual_length
from progtuning_ds.tasks.sources import Split, load_splits

IDS, POSITIONS, LABELS = "input_ids", "position_ids", "labels"


@dataclass(frozen=True)
class SequencePrediction:
    """What the model said of one sequence: summed loss in nats, learnt tokens, those it got right."""

    nll: float
    tokens: int
    right: int


class CausalTask:
    """Sequences of token ids; see `progtuning_ds.tasks.base.Task` for the attributes."""

    main_metric = "token_accuracy"
    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: EncodedRows,
        evaluations: Mapping[str, EncodedRows],
        *,
        packed: bool,
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.train = train
        self.evaluations = dict(evaluations)
        self.packed = packed
        self.notes = list(notes)
        self.model_settings: dict[str, Any] = {}
        self._checked = not packed

    @classmethod
    def build(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> CausalTask:
        """Load, check and encode the rows of a run.

        Raises:
            ConfigError: one line on a missing column, an empty split, a tokenizer without chat template, ...
        """
        task = config.task
        assert isinstance(task, CausalConfig)
        limit = usual_length(task.max_length, 1024, tokenizer, max_positions)
        splits = load_splits(config.data, config.train.seed)
        encode = _encode_text if task.messages_column is None else _encode_chat
        encoded = {
            name: encode(split, task, tokenizer, limit)
            for name, split in (("train", splits.train), ("validation", splits.evaluation), ("test", splits.test))
            if split is not None
        }
        tokens = sum(encoded["train"].lengths)
        notes = [
            f"{len(splits.train.rows)} training rows make {len(encoded['train'].rows)} sequences of up to {limit} "
            f"tokens, {tokens:,} tokens in all; {len(encoded['validation'].rows)} validation sequences "
            f"({splits.evaluation.name})"
        ]
        packed = task.packing and task.messages_column is None
        return cls(tokenizer, encoded.pop("train"), encoded, packed=packed, notes=notes)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad sequences to the longest, on the right: ids, labels and positions or a mask, [rows, length] int64."""
        longest = max(len(row[IDS]) for row in rows)
        pad: Any = self.tokenizer.pad_token_id

        def padded(column: str, filler: int) -> Tensor:
            return torch.tensor([row[column] + [filler] * (longest - len(row[column])) for row in rows])

        batch = {IDS: padded(IDS, pad), LABELS: padded(LABELS, IGNORED)}
        if self.packed:
            # Positions that begin again are how transformers tells documents apart; padding is a document each.
            return batch | {POSITIONS: padded(POSITIONS, 0)}
        mask = [[1] * len(row[IDS]) + [0] * (longest - len(row[IDS])) for row in rows]
        return batch | {"attention_mask": torch.tensor(mask)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the learnt tokens in fp32; scalar."""
        if not self._checked:
            check_no_leak(model, batch[IDS])
            self._checked = True
        logits, labels = _forward(model, batch)
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def items(self, batch: Batch) -> int:
        """Number of learnt tokens."""
        return int((batch[LABELS][:, 1:] != IGNORED).sum())

    def predict(self, model: nn.Module, batch: Batch) -> list[SequencePrediction]:
        """Likelihood of each sequence, and how many next tokens were the most probable ones."""
        logits, labels = _forward(model, batch)
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        learnt = labels != IGNORED
        right = (logits.argmax(-1) == labels) & learnt
        columns = (losses.double().sum(1).tolist(), learnt.sum(1).tolist(), right.sum(1).tolist())
        return [SequencePrediction(*row) for row in zip(*columns, strict=True)]

    def metrics(self, predictions: Sequence[SequencePrediction]) -> dict[str, float]:
        """Next-token accuracy, perplexity, and loss: means over tokens, not over sequences."""
        tokens = sum(row.tokens for row in predictions)
        loss = math.fsum(row.nll for row in predictions) / tokens
        return {
            "token_accuracy": sum(row.right for row in predictions) / tokens,
            "perplexity": math.exp(min(loss, 700.0)),
            "loss": loss,
        }


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [rows, length - 1, words] in fp32 and the tokens that come next, [rows, length - 1]."""
    inputs = {key: value for key, value in batch.items() if key != LABELS}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return logits, batch[LABELS][:, 1:]


def _encode_text(split: Split, task: CausalConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRows:
    require_text(split, task.text_column, "task.text_column")
    end: Any = tokenizer.eos_token_id

    def tokenize(texts: list[str]) -> dict[str, list[Any]]:
        # Not cut here: a long document fills several sequences.
        ids = tokenizer(texts, add_special_tokens=True, verbose=False)[IDS]
        return {IDS: [one if end is None or one[-1:] == [end] else [*one, end] for one in ids]}

    documents = split.rows.select_columns([task.text_column]).map(
        tokenize,
        batched=True,
        input_columns=[task.text_column],
        remove_columns=[task.text_column],
        desc=f"tokenizing {split.name}",
    )
    ids = list(documents[IDS])
    if task.packing:
        packed = list(pack(ids, limit))
        labels = [_learnt(sequence, positions) for sequence, positions in packed]
        return _rows({IDS: [p[0] for p in packed], POSITIONS: [p[1] for p in packed], LABELS: labels}, split)
    cut = [piece for document in ids for piece in pieces(document, limit) if len(piece) > 1]
    return _rows({IDS: cut, LABELS: cut}, split)


def _encode_chat(split: Split, task: CausalConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> EncodedRows:
    column = task.messages_column
    assert column is not None
    require_column(split, column, "task.messages_column")
    check_chat(tokenizer)
    rows = split.rows.select_columns([column])
    for index, messages in enumerate(rows[column]):
        check_messages(messages, f"row {index} of {split.name}")

    def tokenize(messages: list[Any]) -> dict[str, list[Any]]:
        pairs = [encode_chat(tokenizer, one) for one in messages]
        return {IDS: [ids[:limit] for ids, _ in pairs], LABELS: [labels[:limit] for _, labels in pairs]}

    encoded = rows.map(
        tokenize, batched=True, input_columns=[column], remove_columns=[column], desc=f"tokenizing {split.name}"
    )
    return _rows({IDS: list(encoded[IDS]), LABELS: list(encoded[LABELS])}, split)


def _learnt(ids: list[int], positions: list[int]) -> list[int]:
    # Nothing foretells the first token of a document but the end of another one.
    return [IGNORED if position == 0 else token for token, position in zip(ids, positions, strict=True)]


def _rows(columns: dict[str, list[list[int]]], split: Split) -> EncodedRows:
    """Keep the sequences that have something to learn behind their first token."""
    keep = [index for index, labels in enumerate(columns[LABELS]) if _any_learnt(labels[1:])]
    if not keep:
        raise ConfigError(
            f"data: nothing to learn in {split.name}: no token to predict within task.max_length; use a larger one, "
            "or longer texts"
        )
    kept = {name: [values[index] for index in keep] for name, values in columns.items()}
    return EncodedRows(Dataset.from_dict(kept), [len(ids) for ids in kept[IDS]])


def _any_learnt(labels: Iterable[int]) -> bool:
    return any(label != IGNORED for label in labels)
