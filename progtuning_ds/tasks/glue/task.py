"""A GLUE task: rows, batches, loss, scores and submission. Imports torch; no deepspeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from progtuning_ds.config import GlueConfig, RunConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.base import Batch, EncodedRows
from progtuning_ds.tasks.classification import LABEL, RowPrediction, encode_texts
from progtuning_ds.tasks.columns import require_column, require_text
from progtuning_ds.tasks.glue.rows import load_rows
from progtuning_ds.tasks.glue.scores import official_scores
from progtuning_ds.tasks.glue.specs import EVALUATIONS, SPECS, GlueSpec
from progtuning_ds.tasks.glue.submission import write_submission
from progtuning_ds.tasks.lengths import usual_length
from progtuning_ds.tasks.sources import Split


class GlueTask:
    """Rows of one of GLUE's tasks; see `progtuning_ds.tasks.base.Task` for the attributes."""

    auto_class = AutoModelForSequenceClassification

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: GlueSpec,
        train: EncodedRows,
        evaluations: Mapping[str, EncodedRows],
        submissions: Mapping[str, EncodedRows],
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.train = train
        self.evaluations = dict(evaluations)
        self.submissions = dict(submissions)
        self.notes = list(notes)

    @classmethod
    def build(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> GlueTask:
        """Load, check and encode the rows of a run.

        Raises:
            ConfigError: one line on a missing column or split, a label out of range, ...
        """
        task = config.task
        assert isinstance(task, GlueConfig)
        spec = SPECS[task.name]
        limit = usual_length(task.max_length, 128, tokenizer, max_positions)
        found = load_rows(config.data, task.name, spec, config.train.seed)

        def encode(split: Split, *, labelled: bool) -> EncodedRows:
            for column in spec.texts:
                require_text(split, column, f"data ({task.name})")
            labels = _labels(split, spec) if labelled else [0] * len(split.rows)
            return encode_texts(split, spec.texts, labels, tokenizer, limit)

        names = EVALUATIONS.get(task.name, {"validation": "validation"})
        evaluations = {name: encode(found[split], labelled=True) for name, split in names.items() if split in found}
        tests = {split: found[split] for split in spec.submission if split in found and task.submission}
        submissions = {name: encode(split, labelled=False) for name, split in tests.items()}
        train = encode(found["train"], labelled=True)
        sizes = ", ".join(f"{len(rows.rows)} {name} rows" for name, rows in evaluations.items())
        notes = [f"GLUE {task.name}: {len(train.rows)} training rows, {sizes}"]
        if submissions:
            notes.append(f"predictions of {', '.join(submissions)} are written for GLUE's server at the end")
        return cls(tokenizer, spec, train, evaluations, submissions, notes)

    @property
    def main_metric(self) -> str:
        """The first of the official scores."""
        return self.spec.scores[0]

    @property
    def model_settings(self) -> dict[str, Any]:
        """The classes and their names, or one number."""
        if self.spec.is_regression:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(self.spec.labels),
            "id2label": dict(enumerate(self.spec.labels)),
            "label2id": {name: index for index, name in enumerate(self.spec.labels)},
            "problem_type": "single_label_classification",
        }

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad rows to the longest; labels are [rows] int64, or fp32 for regression."""
        features = [{key: value for key, value in row.items() if key != LABEL} for row in rows]
        padded = self.tokenizer.pad(features, return_tensors="pt")
        kind = torch.float32 if self.spec.is_regression else torch.int64
        return dict(padded) | {LABEL: torch.tensor([row[LABEL] for row in rows], dtype=kind)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy, or squared error for regression, in fp32; scalar."""
        return self._losses(*_forward(model, batch)).mean()

    def predict(self, model: nn.Module, batch: Batch) -> list[RowPrediction]:
        """Most probable class of each row, or its number."""
        logits, labels = _forward(model, batch)
        said = logits[:, 0] if self.spec.is_regression else logits.argmax(-1)
        columns = (said.tolist(), labels.tolist(), self._losses(logits, labels).tolist())
        return [RowPrediction(*row) for row in zip(*columns, strict=True)]

    def metrics(self, predictions: Sequence[RowPrediction]) -> dict[str, float]:
        """The official scores and the mean loss."""
        predicted = torch.tensor([row.predicted for row in predictions])
        labels = torch.tensor([row.label for row in predictions])
        loss = sum(row.loss for row in predictions) / len(predictions)
        return official_scores(self.spec, predicted, labels) | {"loss": loss}

    def write_submission(self, name: str, predictions: Sequence[RowPrediction], folder: Path) -> Path:
        """Write what the model said of the test split `name`, in its order."""
        return write_submission(folder, name, self.spec, [row.predicted for row in predictions])

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.spec.is_regression:
            return functional.mse_loss(logits[:, 0], labels, reduction="none")
        return functional.cross_entropy(logits, labels, reduction="none")


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {key: value for key, value in batch.items() if key != LABEL}
    return model(**inputs).logits.float(), batch[LABEL]


def _labels(split: Split, spec: GlueSpec) -> list[Any]:
    """Check that labels are what the task has."""
    require_column(split, "label", "data")
    values = list(split.rows["label"])
    if not spec.is_regression:
        values = [spec.labels.index(value) if value in spec.labels else value for value in values]
    for row, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if spec.is_regression:
            good, allowed = number and 0 <= value <= 5, "0 to 5"
        else:
            good, allowed = number and value in range(len(spec.labels)), f"{', '.join(spec.labels)} or their indices"
        if not good:
            raise ConfigError(
                f"data: label out of range in row {row} of {split.name}: must be {allowed}, got {value!r}"
            )
    return [float(value) for value in values] if spec.is_regression else [int(value) for value in values]
