"""Maps the labels of a data set to class indices. Imports datasets; no torch, no deepspeed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.tasks.sources import Split


@dataclass(frozen=True)
class LabelMap:
    """Class names in the order of their index, and the value that stands for each in the data."""

    names: tuple[str, ...]
    values: tuple[Any, ...]

    def encode(self, split: Split, column: str) -> list[int]:
        """Return the class index of every row.

        Raises:
            ConfigError: if a row has no label, or one that is not among the classes.
        """
        index = {value: position for position, value in enumerate(self.values)}
        indices: list[int] = []
        for row, value in enumerate(map(_plain, split.rows[column])):
            if value not in index:
                if value is None:
                    raise ConfigError(f"data: row {row} of {split.name} has no {column!r}")
                raise ConfigError(
                    f"data: label out of range in row {row} of {split.name}: {column!r} must be one of "
                    f"{_shorten(self.values)}, got {value!r}{did_you_mean(value, self.values)}"
                )
            indices.append(index[value])
        return indices


def map_labels(split: Split, column: str, num_labels: int | None, field: str = "task.label_column") -> LabelMap:
    """Find the classes of the training split: the column's own names, or its distinct values, sorted.

    Args:
        split: the training split.
        column: its label column.
        num_labels: the number of classes if the user gave one; integer labels are then 0..num_labels-1.
        field: the setting that named the column, for messages.

    Raises:
        ConfigError: if there are fewer than two classes, not as many as asked for, or the values are no labels.
    """
    feature = split.rows.features[column]
    if isinstance(feature, ClassLabel):
        labels = LabelMap(tuple(feature.names), tuple(range(feature.num_classes)))
    else:
        values = _distinct(split.rows, split, column, field)
        if num_labels is not None and all(isinstance(value, int) for value in values):
            values = list(range(num_labels))
        labels = LabelMap(tuple(str(value) for value in values), tuple(values))
    if num_labels is not None and len(labels.names) != num_labels:
        raise ConfigError(
            f"model.num_labels is {num_labels} but {column!r} has {len(labels.names)} classes in {split.name}: "
            f"{_shorten(labels.names)}"
        )
    if len(labels.names) < 2:
        raise ConfigError(
            f"{field}: {column!r} must hold at least two classes, got {_shorten(labels.names)} in {split.name}"
        )
    return labels


def majority_share(indices: list[int]) -> float:
    """Accuracy of always naming the most frequent class."""
    return Counter(indices).most_common(1)[0][1] / len(indices)


def _distinct(rows: Dataset, split: Split, column: str, field: str) -> list[Any]:
    values = {_plain(value) for value in rows.unique(column)} - {None}
    for value in values:
        if not isinstance(value, int | str):
            raise ConfigError(f"{field}: {column!r} must hold class names or integers, got {value!r} in {split.name}")
    if len({type(value) for value in values}) > 1:
        raise ConfigError(f"{field}: {column!r} mixes names and numbers in {split.name}")
    return sorted(values)


def _plain(value: Any) -> Any:
    """Fold what a csv reader makes of integers: True and 1.0 are 1."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return value


def _shorten(values: tuple[Any, ...], most: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > most else shown or "none"
