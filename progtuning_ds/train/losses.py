"""The loss of a forward pass, weighed so that an optimizer step is a mean over all it learns from. No deepspeed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from progtuning_ds.tasks import Batch, CountsItems, Task
from progtuning_ds.train.ranks import Ranks


class StepLoss:
    """Losses of the forward passes of optimizer steps.

    An engine averages over the passes and ranks of a step. Where passes hold unequal numbers of tokens, a mean of their
    means is not the mean over the tokens of the step, and depends on how rows were dealt out. So each pass is weighed
    by its share of them; where the shares are equal, its loss is left as it is to the bit.

    Args:
        task: gives the loss of a pass and, where that is no mean over rows, the number of items it is a mean of.
        ranks: this process among the others.
    """

    def __init__(self, task: Task, ranks: Ranks) -> None:
        self._task = task
        self._ranks = ranks
        self._total: Tensor | None = None

    def begin(self, batches: list[Batch]) -> None:
        """Count the items of a step's batches over all ranks. Collective for tasks that count items, else free."""
        if not isinstance(self._task, CountsItems):
            return
        items = sum(self._task.items(batch) for batch in batches)
        self._total = torch.tensor(items, dtype=torch.float64, device=self._ranks.device)
        dist.all_reduce(self._total)  # stays on the device, so that nobody waits for it

    def __call__(self, model: nn.Module, batch: Batch, passes: int) -> Tensor:
        """Run the model on a batch of the step that has begun.

        Args:
            model: the engine or the bare module.
            batch: on the CPU, a piece of one of the step's batches; it is moved to the device.
            passes: forward passes of the step on each rank.

        Returns:
            A scalar with gradient, whose mean over the passes and ranks of the step is the loss of the step.
        """
        inputs = {name: values.to(self._ranks.device, non_blocking=True) for name, values in batch.items()}
        loss = self._task.loss(model, inputs)
        if not isinstance(self._task, CountsItems):
            return loss
        assert self._total is not None, "begin() was not called"
        share = self._task.items(batch) * passes * self._ranks.world_size / self._total.clamp(min=1)
        return loss * share.to(loss.dtype)
