"""GLUE's official scores, by torchmetrics. Imports torch; no deepspeed."""

from __future__ import annotations

import math

from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from progtuning_ds.tasks import class_scores
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
    if spec.is_regression:
        scorers = {"pearson": pearson_corrcoef, "spearman": spearman_corrcoef}
        values = {name: float(scorers[name](predicted.double(), labels.double())) for name in spec.scores}
        return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}
    counts = class_scores.pairs(predicted, labels, len(spec.labels))
    of_classes = {
        "accuracy": class_scores.accuracy,
        "f1": class_scores.f1_positive,
        "matthews": class_scores.matthews,
    }
    return {name: of_classes[name](counts) for name in spec.scores}
