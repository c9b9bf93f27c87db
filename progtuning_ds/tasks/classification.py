"""Classification of a sentence or a pair of sentences: data, collation, loss, metrics. No deepspeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from progtuning_ds.config import ClassificationConfig, RunConfig
from progtuning_ds.tasks import class_scores
from progtuning_ds.tasks.base import Batch, EncodedRows
from progtuning_ds.tasks.columns import require_column, require_scalar, require_text
from progtuning_ds.tasks.labels import LabelMap, majority_share, map_labels
from progtuning_ds.tasks.lengths import length_limit
from progtuning_ds.tasks.sources import Split, load_splits

LABEL, LENGTH = "labels", "length"


@dataclass(frozen=True)
class RowPrediction:
    """What the model said of one row, and what was true: class indices (numbers for regression), and the loss."""

    predicted: float
    label: float
    loss: float


class ClassificationTask:
    """Rows encoded as token ids with a class index; see `progtuning_ds.tasks.base.Task` for the attributes."""

    main_metric = "accuracy"
    auto_class = AutoModelForSequenceClassification

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: LabelMap,
        train: EncodedRows,
        evaluations: Mapping[str, EncodedRows],
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.train = train
        self.evaluations = dict(evaluations)
        self.notes = list(notes)

    @classmethod
    def build(
        cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None
    ) -> ClassificationTask:
        """Load, check and encode the rows of a run.

        Args:
            config: the run configuration; `data` and `task` say where the rows are and what their columns mean.
            tokenizer: the model's tokenizer, with a padding token.
            max_positions: the longest sequence the model can read, in tokens, if it has a limit.

        Raises:
            ConfigError: one line on a missing column, an empty split, a label out of range, ...
        """
        task = config.task
        assert isinstance(task, ClassificationConfig)
        limit = length_limit(task.max_length, tokenizer, max_positions)
        splits = load_splits(config.data, config.train.seed)
        for split in splits:
            _check_columns(split, task)
        labels = map_labels(splits.train, task.label_column, config.model.num_labels)
        encoded = {
            name: _encode(split, task, labels, tokenizer, limit)
            for name, split in (("train", splits.train), ("validation", splits.evaluation), ("test", splits.test))
            if split is not None
        }
        notes = [
            f"{len(encoded['train'].rows)} training rows, {len(encoded['validation'].rows)} validation rows "
            f"({splits.evaluation.name}), {len(labels.names)} classes; "
            f"majority {majority_share(list(encoded['validation'].rows[LABEL])):.3f}"
        ]
        cut = sum(length == limit for length in encoded["train"].lengths)
        if cut:
            notes.append(f"{cut} training rows reach task.max_length {limit} and are cut there")
        return cls(tokenizer, labels, encoded.pop("train"), encoded, notes)

    @property
    def model_settings(self) -> dict[str, Any]:
        """The classes and their names, for the model's configuration."""
        names = self.labels.names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad rows to the longest: token ids [rows, length] int64 and what the tokenizer adds, labels [rows]."""
        features = [{key: value for key, value in row.items() if key != LABEL} for row in rows]
        padded = self.tokenizer.pad(features, return_tensors="pt")
        return dict(padded) | {LABEL: torch.tensor([row[LABEL] for row in rows])}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in fp32; scalar."""
        logits, labels = _forward(model, batch)
        return functional.cross_entropy(logits, labels)

    def predict(self, model: nn.Module, batch: Batch) -> list[RowPrediction]:
        """Most probable class of each row."""
        logits, labels = _forward(model, batch)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        columns = (logits.argmax(-1).tolist(), labels.tolist(), losses.tolist())
        return [RowPrediction(*row) for row in zip(*columns, strict=True)]

    def metrics(self, predictions: Sequence[RowPrediction]) -> dict[str, float]:
        """Accuracy, macro F1 (over the classes that occur), Matthews correlation, and mean loss."""
        predicted = torch.tensor([row.predicted for row in predictions])
        labels = torch.tensor([row.label for row in predictions])
        counts = class_scores.pairs(predicted, labels, len(self.labels.names))
        return {
            "accuracy": class_scores.accuracy(counts),
            "f1_macro": class_scores.f1_macro(counts),
            "matthews": class_scores.matthews(counts),
            "loss": sum(row.loss for row in predictions) / len(predictions),
        }


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {key: value for key, value in batch.items() if key != LABEL}
    return model(**inputs).logits.float(), batch[LABEL]


def _check_columns(split: Split, task: ClassificationConfig) -> None:
    require_text(split, task.text_column, "task.text_column")
    if task.pair_column is not None:
        require_text(split, task.pair_column, "task.pair_column")
    require_column(split, task.label_column, "task.label_column")
    require_scalar(split, task.label_column, "task.label_column")


def _encode(
    split: Split,
    task: ClassificationConfig,
    labels: LabelMap,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> EncodedRows:
    columns = [name for name in (task.text_column, task.pair_column) if name is not None]
    return encode_texts(split, columns, labels.encode(split, task.label_column), tokenizer, limit)


def encode_texts(
    split: Split,
    columns: Sequence[str],
    labels: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
) -> EncodedRows:
    """Return the tokens of every row's text or pair of texts, and its label under LABEL.

    Args:
        split: the rows.
        columns: one or two columns of text.
        labels: one per row.
        tokenizer: the model's.
        limit: tokens after which a text (pair) is cut, if any.
    """

    def tokenize(*texts: list[str]) -> dict[str, list[Any]]:
        encoded = tokenizer(*texts, truncation=limit is not None, max_length=limit)
        return {**encoded, LENGTH: [len(ids) for ids in encoded["input_ids"]]}

    names = list(columns)
    rows = split.rows.select_columns(names).map(
        tokenize, batched=True, input_columns=names, remove_columns=names, desc=f"tokenizing {split.name}"
    )
    lengths = list(rows[LENGTH])
    return EncodedRows(rows.remove_columns(LENGTH).add_column(LABEL, list(labels)), lengths)
