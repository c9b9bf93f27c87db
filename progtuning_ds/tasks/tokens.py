"""Classification of every word of a row, such as named entities, scored by seqeval. Imports torch; no deepspeed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, List, Value
from seqeval import metrics as seqeval
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from progtuning_ds.config import RunConfig, TokensConfig
from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.tasks.base import Batch, EncodedRows
from progtuning_ds.tasks.columns import require_column
from progtuning_ds.tasks.lengths import length_limit
from progtuning_ds.tasks.sources import Split, load_splits

IGNORED = -100
LABEL, GOLD, WORDS = "labels", "gold", "words"
OUTSIDE = "O"


@dataclass(frozen=True)
class TagsPrediction:
    """Tags of one row's words: what the model said and what is true; and the summed loss of the words it saw."""

    predicted: tuple[str, ...]
    gold: tuple[str, ...]
    loss: float
    words: int


class TokenTask:
    """Rows of words with a tag each; see `progtuning_ds.tasks.base.Task` for the attributes.

    The first token of a word carries its tag. Words behind `task.max_length` are not learnt, and count as `O` when a
    row is scored: every word of the data is scored once.
    """

    main_metric = "f1"
    auto_class = AutoModelForTokenClassification

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        train: EncodedRows,
        evaluations: Mapping[str, EncodedRows],
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.train = train
        self.evaluations = dict(evaluations)
        self.notes = list(notes)

    @classmethod
    def build(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> TokenTask:
        """Load, check and encode the rows of a run.

        Raises:
            ConfigError: one line on a missing column, tags that do not fit the words, ...
        """
        task = config.task
        assert isinstance(task, TokensConfig)
        if not tokenizer.is_fast:
            raise ConfigError(
                "task.kind token_classification needs a fast tokenizer, which says which word a token is of"
            )
        limit = length_limit(task.max_length, tokenizer, max_positions)
        splits = load_splits(config.data, config.train.seed)
        for split in splits:
            _check_columns(split, task)
        names = _tag_names(splits.train, task.tags_column)
        encoded = {
            name: _encode(split, task, names, tokenizer, limit)
            for name, split in (("train", splits.train), ("validation", splits.evaluation), ("test", splits.test))
            if split is not None
        }
        cut = sum(len(row[GOLD]) > row[WORDS] for row in encoded["train"].rows)
        notes = [
            f"{len(encoded['train'].rows)} training rows, {len(encoded['validation'].rows)} validation rows "
            f"({splits.evaluation.name}), {len(names)} tags"
        ]
        if cut:
            notes.append(f"{cut} training rows have words behind task.max_length, which are not learnt")
        return cls(tokenizer, names, encoded.pop("train"), encoded, notes)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The tags and their names, for the model's configuration."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad rows to the longest: token ids and labels [rows, tokens], all tags `gold` [rows, words], int64."""
        own = (LABEL, GOLD, WORDS)
        padded = dict(
            self.tokenizer.pad([{k: v for k, v in row.items() if k not in own} for row in rows], return_tensors="pt")
        )
        length = padded["input_ids"].shape[1]
        labels = [_aligned(row[LABEL], length, self.tokenizer.padding_side) for row in rows]
        most = max(len(row[GOLD]) for row in rows)
        gold = [row[GOLD] + [IGNORED] * (most - len(row[GOLD])) for row in rows]
        return padded | {LABEL: torch.tensor(labels), GOLD: torch.tensor(gold)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the words in fp32; scalar."""
        logits, labels = _forward(model, batch)
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def items(self, batch: Batch) -> int:
        """Number of words with a tag that is learnt."""
        return int((batch[LABEL] != IGNORED).sum())

    def predict(self, model: nn.Module, batch: Batch) -> list[TagsPrediction]:
        """Most probable tag of every word."""
        logits, labels = _forward(model, batch)
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        said, seen = logits.argmax(-1), labels != IGNORED
        answers = []
        for row in range(len(labels)):
            gold = [self.names[tag] for tag in batch[GOLD][row].tolist() if tag != IGNORED]
            tags = [self.names[tag] for tag in said[row][seen[row]].tolist()]
            behind = [OUTSIDE] * (len(gold) - len(tags))
            answers.append(TagsPrediction((*tags, *behind), tuple(gold), losses[row].sum().item(), len(tags)))
        return answers

    def metrics(self, predictions: Sequence[TagsPrediction]) -> dict[str, float]:
        """F1, precision and recall of whole entities (seqeval, as conlleval), accuracy of words, mean loss."""
        gold, said = [list(row.gold) for row in predictions], [list(row.predicted) for row in predictions]
        with warnings.catch_warnings():  # a model that names no entity, or tags that mark none, score 0
            warnings.simplefilter("ignore")
            scores: dict[str, Any] = {
                "f1": seqeval.f1_score(gold, said),
                "precision": seqeval.precision_score(gold, said),
                "recall": seqeval.recall_score(gold, said),
                "accuracy": seqeval.accuracy_score(gold, said),
            }
        words = max(sum(row.words for row in predictions), 1)
        loss = sum(row.loss for row in predictions) / words
        return {name: float(value) for name, value in scores.items()} | {"loss": loss}


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {key: value for key, value in batch.items() if key not in (LABEL, GOLD)}
    return model(**inputs).logits.float(), batch[LABEL]


def _aligned(labels: list[int], length: int, side: str) -> list[int]:
    filler = [IGNORED] * (length - len(labels))
    return filler + labels if side == "left" else labels + filler


def _check_columns(split: Split, task: TokensConfig) -> None:
    for column, field in ((task.words_column, "task.words_column"), (task.tags_column, "task.tags_column")):
        require_column(split, column, field)
        feature = split.rows.features[column]
        inner = getattr(feature, "feature", None)
        if not isinstance(feature, List) or not isinstance(inner, Value | ClassLabel):
            raise ConfigError(f"{field}: {column!r} must hold a list per row in {split.name}, got {feature}")
        if column == task.words_column and getattr(inner, "dtype", "") not in ("string", "large_string"):
            raise ConfigError(f"{field}: {column!r} must hold lists of text in {split.name}, got {feature}")
    both = zip(split.rows[task.words_column], split.rows[task.tags_column], strict=True)
    for row, (words, tags) in enumerate(both):
        if not words or tags is None or len(words) != len(tags):
            have = f"{len(words or ())} words and {len(tags or ())} tags"
            raise ConfigError(
                f"data: row {row} of {split.name} must have as many tags as words, one at least, got {have}"
            )


def _tag_names(split: Split, column: str) -> list[str]:
    inner = split.rows.features[column].feature
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    values = {value for tags in split.rows[column] for value in tags}
    if all(isinstance(value, str) for value in values):
        return sorted(values, key=lambda name: (name != OUTSIDE, name))  # O is class 0, as everywhere
    if all(isinstance(value, int) for value in values):
        raise ConfigError(
            f"task.tags_column: {column!r} holds numbers without names in {split.name}; name them (B-PER, I-PER, O, "
            f"...), or save the data set with a ClassLabel column"
        )
    raise ConfigError(f"task.tags_column: {column!r} must hold names of tags in {split.name}")


def _indices(split: Split, column: str, names: list[str]) -> list[list[int]]:
    index: dict[Any, int] = {name: position for position, name in enumerate(names)}
    if isinstance(split.rows.features[column].feature, ClassLabel):
        index |= {position: position for position in range(len(names))}
    found = []
    for row, tags in enumerate(split.rows[column]):
        for tag in tags:
            if tag not in index:
                raise ConfigError(
                    f"data: label out of range in row {row} of {split.name}: {column!r} must hold {', '.join(names)}, "
                    f"got {tag!r}{did_you_mean(tag, names)}"
                )
        found.append([index[tag] for tag in tags])
    return found


def _encode(
    split: Split, task: TokensConfig, names: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> EncodedRows:
    tags = _indices(split, task.tags_column, names)
    words = split.rows.select_columns([task.words_column])

    def tokenize(rows: list[list[str]], indices: list[int]) -> dict[str, list[Any]]:
        encoded = tokenizer(rows, is_split_into_words=True, truncation=limit is not None, max_length=limit)
        labels, seen = [], []
        for at, index in enumerate(indices):
            word_ids = encoded.word_ids(at)
            first = [word is not None and word not in word_ids[:token] for token, word in enumerate(word_ids)]
            labels.append(
                [tags[index][word] if is_first else IGNORED for word, is_first in zip(word_ids, first, strict=True)]
            )
            seen.append(sum(first))
            _check_every_word(word_ids, len(rows[at]), seen[-1], limit, f"row {index} of {split.name}")
        return {**encoded, LABEL: labels, GOLD: [tags[index] for index in indices], WORDS: seen}

    rows = words.map(
        tokenize,
        batched=True,
        with_indices=True,
        input_columns=[task.words_column],
        remove_columns=[task.words_column],
        desc=f"tokenizing {split.name}",
    )
    return EncodedRows(rows, [len(ids) for ids in rows["input_ids"]])


def _check_every_word(word_ids: list[int | None], words: int, seen: int, limit: int | None, where: str) -> None:
    """A word without a token (a control character alone) would shift the tags of those behind it."""
    last = max((word for word in word_ids if word is not None), default=-1)
    cut = limit is not None and len(word_ids) >= limit
    if seen != last + 1 or (seen < words and not cut):
        raise ConfigError(f"data: {where} has a word that the tokenizer makes no token of; remove or replace it")
