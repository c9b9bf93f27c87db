"""Tries a larger micro-batch before it counts: one pass that leaves no trace. Imports torch; no deepspeed.

The pass runs on stand-ins for the parameters: the same memory under other leaves of the graph, on which nobody has
hung a hook. So DeepSpeed takes no part, nothing crosses ranks, and a rank that runs out of memory in forward or in
backward keeps no other waiting. Gradients go as they come; room for those that a real pass would hold, and for
DeepSpeed's buckets, is taken beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from progtuning_ds.tasks import Batch, Task
from progtuning_ds.train.job import Job
from progtuning_ds.train.shortage import is_out_of_memory


def rehearse(task: Task, module: nn.Module, batch: Batch, ballast: int) -> bool:
    """Run forward and backward of a batch, and say whether memory sufficed.

    Args:
        task: gives the loss.
        module: the bare model; its weights must be whole (not under ZeRO-3). Nothing of it changes.
        batch: on the device; the one that needs most.
        ballast: bytes to hold meanwhile.

    Raises:
        RuntimeError: whatever fails for another reason.
    """
    device = next(iter(batch.values())).device
    random = _random_state()
    try:
        held = torch.empty(ballast, dtype=torch.uint8, device=device)
        _run(task, module, batch)
        del held
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        _set_random_state(random)  # the rows of the next step see the dropout that they would have seen
    return True


def longest_batch(job: Job, rows: int, device: torch.device) -> Batch:
    """A batch of the longest training rows, on the device: what needs most."""
    lengths = job.task.train.lengths
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    chosen = [order[index % len(order)] for index in range(rows)]
    batch = job.task.collate([job.task.train.rows[index] for index in chosen])
    return {name: values.to(device) for name, values in batch.items()}


class _Pass(nn.Module):
    """Backward belongs into the call: recomputation must meet the stand-ins too."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._task = task

    def forward(self, batch: Batch) -> None:
        """Run both directions."""
        self._task.loss(self.module, batch).backward()


def _run(task: Task, module: nn.Module, batch: Batch) -> None:
    stand_ins: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            stand_ins[f"module.{name}"] = leaf = parameter.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(_drop)
    with _uncompiled(module):
        functional_call(_Pass(task, module), stand_ins, (batch,))


@contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """Undo `Module.compile` for a moment: graphs for the stand-ins would serve nobody else."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
