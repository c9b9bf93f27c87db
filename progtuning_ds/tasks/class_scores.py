"""Scores of predicted classes in full precision, from torchmetrics' count of each pair. Imports torch; no deepspeed.

torchmetrics' own scores are in fp32, whose last digits are not those of scikit-learn, with which tables are compared.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def pairs(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Rows of each class by the class that was predicted, [true, predicted] fp64; both inputs [rows] int64."""
    return multiclass_confusion_matrix(predicted, labels, classes).double()


def accuracy(counts: Tensor) -> float:
    """Share of right predictions; `counts` as `pairs` gives them."""
    return float(counts.trace() / counts.sum())


def f1(counts: Tensor) -> list[float]:
    """F1 of each class that occurs, as a label or as a prediction, in order of the class."""
    right, said, true = counts.diagonal(), counts.sum(0), counts.sum(1)
    occurs = said + true > 0
    return (2 * right[occurs] / (said + true)[occurs]).tolist()


def f1_macro(counts: Tensor) -> float:
    """Mean of the F1 of the classes that occur, as scikit-learn's."""
    each = f1(counts)
    return sum(each) / len(each)


def f1_positive(counts: Tensor) -> float:
    """F1 of class 1; 0 where it does not occur."""
    both = float(counts[1].sum() + counts[:, 1].sum())
    return 2 * float(counts[1, 1]) / both if both else 0.0


def matthews(counts: Tensor) -> float:
    """Matthews correlation of any number of classes; 0 where labels or predictions are all one class.

    After J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004).
    """
    rows, right, said, true = counts.sum(), counts.trace(), counts.sum(0), counts.sum(1)
    spread = (rows**2 - said @ said) * (rows**2 - true @ true)
    return float((right * rows - said @ true) / spread.sqrt()) if spread > 0 else 0.0
