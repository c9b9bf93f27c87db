"""Writes predictions as GLUE's server takes them. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from progtuning_ds.tasks.glue.specs import GlueSpec


def write_submission(folder: Path, split: str, spec: GlueSpec, values: Sequence[float]) -> Path:
    """Write a tsv file with a header and one line per row of the test split, in its order.

    Args:
        folder: created if needed.
        split: `test`, `test_matched` or `test_mismatched`.
        spec: the task.
        values: class index of each row, or for regression a number, which is clipped to 0..5.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / spec.submission[split]
    lines = ["index\tprediction"]
    lines += [f"{index}\t{_said(value, spec)}" for index, value in enumerate(values)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _said(value: float, spec: GlueSpec) -> str:
    if spec.is_regression:
        return f"{min(max(value, 0.0), 5.0):.3f}"
    return spec.labels[int(value)] if spec.named else str(int(value))
