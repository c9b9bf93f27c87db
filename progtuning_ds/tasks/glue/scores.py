"""GLUE's official scores, by torchmetrics. Imports torch; no deepspeed."""

from __future__ import annotations

import math

from torch import Tensor
from torchmetrics.functional import classification as of_classes
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from progtuning_ds.tasks.glue.specs import GlueSpec


def official_scores(spec: GlueSpec, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Score a split.

    Args:
        spec: the task.
        predicted: class indices [rows] int64, or for regression numbers [rows] fp32.
        labels: the same of what is true.

    Returns:
        The scores in the order of `spec.scores`; a correlation that is not defined (constant predictions) is 0.
    """
    classes = len(spec.labels)
    scorers = {
        "accuracy": lambda: of_classes.multiclass_accuracy(predicted, labels, classes, average="micro"),
        "f1": lambda: of_classes.binary_f1_score(predicted, labels),
        "matthews": lambda: of_classes.multiclass_matthews_corrcoef(predicted, labels, classes),
        "pearson": lambda: pearson_corrcoef(predicted.double(), labels.double()),
        "spearman": lambda: spearman_corrcoef(predicted.double(), labels.double()),
    }
    values = {name: float(scorers[name]()) for name in spec.scores}
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
