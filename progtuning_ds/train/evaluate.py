"""Predictions of every row of a split, over all ranks. Knows no task and no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from progtuning_ds.tasks import EncodedRows, Task
from progtuning_ds.train.order import evaluation_batches
from progtuning_ds.train.ranks import Ranks


def evaluate(
    task: Task, model: nn.Module, split: EncodedRows, ranks: Ranks, batch_size: int
) -> tuple[dict[str, float], list[Any]]:
    """Score a model on a split. Collective: all ranks run the same number of forward passes.

    Args:
        task: gives collation, predictions and metrics.
        model: the engine or the bare module; its training mode is restored afterwards.
        split: the encoded rows, the same on every rank.
        ranks: this process among the others.
        batch_size: rows per rank and forward pass.

    Returns:
        The metrics and the predictions of all rows in order, both on every rank.
    """
    ordered = predict(task, model, split, ranks, batch_size)
    return task.metrics(ordered), ordered


def predict(task: Task, model: nn.Module, split: EncodedRows, ranks: Ranks, batch_size: int) -> list[Any]:
    """Return the predictions of all rows of a split in order, on every rank; as `evaluate`, without scores."""
    batches = evaluation_batches(split.lengths, ranks.rank, ranks.world_size, batch_size)
    predictions: list[tuple[int, Any]] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for indices in batches:
            # A rank without rows left runs along on the first one, and its answer is not counted.
            batch = task.collate([split.rows[index] for index in indices or [0]])
            answers = task.predict(model, {key: value.to(ranks.device) for key, value in batch.items()})
            predictions += zip(indices, answers, strict=False)
    model.train(was_training)
    return _merge(ranks.gather(predictions), len(split.rows))


def _merge(shares: Sequence[list[tuple[int, Any]]], num_rows: int) -> list[Any]:
    merged = dict(pair for share in shares for pair in share)
    counted = sum(len(share) for share in shares)
    assert counted == len(merged) == num_rows, f"{counted} predictions for {num_rows} rows"
    return [merged[index] for index in range(num_rows)]
