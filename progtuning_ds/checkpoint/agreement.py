"""What all ranks of a save or a load agree on: either each did its part, or all raise the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from progtuning_ds.errors import CheckpointError

Result = TypeVar("Result")
_EXPECTED = (OSError, TypeError, CheckpointError)


def on_all(function: Callable[[], Result]) -> list[Result]:
    """Call a function on every rank and return all results in rank order, on every rank. Collective.

    Raises:
        CheckpointError: on every rank, if it failed on any; the message is the first failing rank's.
    """
    result: Any = None
    error: str | None = None
    try:
        result = function()
    except _EXPECTED as caught:
        error = describe(caught)
    outcomes = gather((result, error))
    failures = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
    if failures:
        rank, text = failures[0]
        raise CheckpointError(text if rank == 0 else f"rank {rank}: {text}")
    return [value for value, _ in outcomes]


def on_first(function: Callable[[], Result]) -> Result:
    """Call a function on the first rank only and return its result on every rank; errors as in `on_all`."""
    return on_all(lambda: function() if rank() == 0 else None)[0]  # type: ignore[return-value]


def gather(item: Any) -> list[Any]:
    """Return an item of every rank, in rank order, on every rank. Collective if there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def rank() -> int:
    """This process among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def describe(error: BaseException) -> str:
    """One line on what went wrong; of an error of the operating system its own words and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
