"""What the training loop needs to know of a task, and nothing more. Imports torch; no deepspeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from datasets import Dataset
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Rows ready to collate, and the length of each in tokens."""

    rows: Dataset
    lengths: Sequence[int]


@runtime_checkable
class Submits(Protocol):
    """A task that also predicts rows without labels, for a test server."""

    @property
    def submissions(self) -> Mapping[str, EncodedRows]:
        """Test splits to predict at the end of a run, by name."""
        ...

    def write_submission(self, name: str, predictions: Sequence[Any], folder: Path) -> Path:
        """Write the predictions of all rows of a test split as its server takes them; returns the file."""
        ...


@runtime_checkable
class CountsItems(Protocol):
    """A task whose loss is a mean over items, such as tokens, of which batches of as many rows hold unequal numbers."""

    def items(self, batch: Batch) -> int:
        """Number of items that `loss` is the mean of."""
        ...


class Task(Protocol):
    """Data, collation, loss and metrics of one kind of learning; built by `progtuning_ds.tasks.build_task`.

    A task owns what its rows mean. It knows nothing of ranks, stages or DeepSpeed: the loop decides which rows go
    where, and hands back the predictions of all rows in order.
    """

    @property
    def train(self) -> EncodedRows:
        """What to train on."""
        ...

    @property
    def evaluations(self) -> Mapping[str, EncodedRows]:
        """What to evaluate on: `validation`, and `test` where there is one."""
        ...

    @property
    def main_metric(self) -> str:
        """The metric that a summary shows; higher is better."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of the data, one line each."""
        ...

    @property
    def auto_class(self) -> type:
        """The Auto class of transformers that loads the model with the right head."""
        ...

    @property
    def model_settings(self) -> dict[str, Any]:
        """Attributes of the model's configuration that follow from the data, such as `num_labels`."""
        ...

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad rows to one batch on the CPU."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model and return the mean loss over the rows (`CountsItems`: the items), a scalar with gradient."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """Run the model and return one picklable item per row, without gradient."""
        ...

    def metrics(self, predictions: Sequence[Any]) -> dict[str, float]:
        """Score the predictions of all rows of a split, including their mean `loss`."""
        ...
