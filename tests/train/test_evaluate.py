"""An evaluation over ranks is the evaluation by one process, with sizes that do not divide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from progtuning_ds.tasks import EncodedRows
from tests.ranks import RankPools


class Squares(nn.Module):
    """Counts its forward passes, as a model whose forward is a collective would need them to agree."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.passes += 1
        return values**2


class SquaresTask:
    """Predicts the square of each row; its metric shows order, loss and double counting."""

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {"values": torch.tensor([row["value"] for row in rows])}

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[int]:
        return model(**batch).tolist()

    def metrics(self, predictions: Sequence[int]) -> dict[str, float]:
        return {"rows": len(predictions), "weighted": sum(i * value for i, value in enumerate(predictions))}


def evaluate_squares(values: list[int], lengths: list[int], batch_size: int) -> tuple[dict, list, int, bool]:
    import torch.distributed as dist

    from progtuning_ds.train.evaluate import evaluate
    from progtuning_ds.train.ranks import Ranks

    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    model = Squares().train()
    rows = EncodedRows(Dataset.from_dict({"value": values}), lengths)
    metrics, predictions = evaluate(SquaresTask(), model, rows, ranks, batch_size)
    return metrics, predictions, model.passes, model.training


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_no_row_is_dropped_or_counted_twice(ranks: RankPools, num_rows: int, batch_size: int) -> None:
    values = [(7 * index + 3) % 11 for index in range(num_rows)]
    lengths = [(5 * index) % 7 + 1 for index in range(num_rows)]
    replies = ranks(3).run(evaluate_squares, values=values, lengths=lengths, batch_size=batch_size)
    expected = [value**2 for value in values]
    for metrics, predictions, _, training in replies:
        assert predictions == expected
        assert metrics == SquaresTask().metrics(expected)
        assert training, "the mode before the evaluation is restored"
    assert len({passes for _, _, passes, _ in replies}) == 1
