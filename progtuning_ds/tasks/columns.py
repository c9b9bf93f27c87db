"""Checks that a split has the columns a task reads. Imports datasets; no torch, no deepspeed."""

from __future__ import annotations

from datasets import ClassLabel, Value

from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.tasks.sources import Split


def require_column(split: Split, column: str, field: str) -> None:
    """Raise a ConfigError with the nearest name if the split lacks a column; `field` is the setting's name."""
    names = split.rows.column_names
    if column not in names:
        raise ConfigError(
            f"{field} must be one of {', '.join(names)} in {split.name}, got {column!r}{did_you_mean(column, names)}"
        )


def require_scalar(split: Split, column: str, field: str) -> None:
    """Raise a ConfigError if a column holds lists or records instead of one value per row."""
    feature = split.rows.features[column]
    if not isinstance(feature, Value | ClassLabel):
        raise ConfigError(f"{field}: {column!r} must hold one value per row in {split.name}, got {feature}")


def require_text(split: Split, column: str, field: str) -> None:
    """Raise a ConfigError if a column is absent, holds something else than text, or has rows without any."""
    require_column(split, column, field)
    features = split.rows.features
    if not _is_text(features[column]):
        texts = [name for name, feature in features.items() if _is_text(feature)]
        kind = getattr(features[column], "dtype", features[column])
        raise ConfigError(
            f"{field}: {column!r} must hold text in {split.name}, got {kind}; columns with text: "
            f"{', '.join(texts) or 'none'}"
        )
    empty = [row for row, text in enumerate(split.rows[column]) if text is None]
    if empty:
        raise ConfigError(
            f"{field}: {column!r} must hold text in every row, but is missing in {len(empty)} of {split.name}, "
            f"first in row {empty[0]}"
        )


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
