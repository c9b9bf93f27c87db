"""What would fit where nothing does: more GPUs, larger ones, shorter rows, adapters. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from progtuning_ds.memory.choices import Choice
from progtuning_ds.memory.request import MAX_GPUS, Budget, Request
from progtuning_ds.memory.search import Failure, Proposal, search
from progtuning_ds.memory.workload import Workload

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the request under which something fits."""

    words: str
    proposal: Proposal


def remedies(load: Workload, request: Request) -> Iterator[Remedy]:
    """Look for the smallest change of each kind under which something fits: GPUs, memory, length, adapters."""
    gpus = request.gpus
    while gpus < MAX_GPUS:
        gpus = min(2 * gpus, MAX_GPUS)
        batch = -(-request.global_batch // gpus) * gpus
        found = search(load, replace(request, gpus=gpus, global_batch=batch)).proposal
        if found:
            more = f" (global batch {batch})" if batch != request.global_batch else ""
            yield Remedy(f"{gpus} GPUs instead of {request.gpus}{more}: {found.choice}", found)
            break
    smaller = request.seq_len
    while smaller > 128:
        smaller = max(128, smaller // 2)
        found = search(load, replace(request, seq_len=smaller)).proposal
        if found:
            yield Remedy(f"sequences of {smaller} tokens instead of {request.seq_len}: {found.choice}", found)
            break
    for bits, name in ((16, "LoRA (rank 16)"), (4, "LoRA (rank 16) on a 4-bit base")):
        if load.shape is None:
            break
        adapted = Workload(load.params.with_adapters(load.shape, rank=16), load.shape, load.plan)
        found = search(adapted, replace(request, frozen_bits=bits, on_freeze="keep")).proposal
        if found:
            yield Remedy(f"{name}: {found.choice}", found)
            break


def least_memory(failures: Sequence[Failure], budget: Budget) -> tuple[Choice, int] | None:
    """Of what failed on the device, the choice that comes nearest and the memory per GPU it would need."""
    on_device = [failure for failure in failures if failure.where == "device"]
    if not on_device:
        return None
    nearest = min(on_device, key=lambda failure: failure.missing)
    needed = budget.device + nearest.missing
    return nearest.choice, -(-needed // _MIB) * _MIB
