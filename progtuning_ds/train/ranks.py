"""The processes of a run: start-up, device, and the few collectives the program itself needs. No deepspeed.runtime."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from progtuning_ds.config import Hardware
from progtuning_ds.errors import ConfigError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    def gather(self, item: Any) -> list[Any]:
        """Return a picklable item of every rank, in rank order, on every rank. Collective."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def mean(self, values: torch.Tensor) -> list[float]:
        """Average a 1-dimensional tensor over the ranks, element by element, in fp64. Collective."""
        total = values.detach().to(device=self.device, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.world_size).tolist()

    def local_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on one rank per node, then on the others, which find its caches. Collective.

        Raises:
            ConfigError: on every rank, if the function raised one on any; so none is left waiting for another.
        """
        result: list[Result] = []
        for turn in (True, False):
            error = None
            if turn == (self.local_rank == 0):
                try:
                    result.append(function())
                except ConfigError as caught:
                    error = caught
            errors = [text for text in self.gather(str(error) if error else None) if text is not None]
            if errors:
                raise error or ConfigError(errors[0])
        return result[0]


def start_ranks() -> Ranks:
    """Join the process group that the launcher describes, or make one of a single process without a launcher."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would spend most of a minute compiling an all-reduce that only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _share_cores()
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(verbose=False)
    device = torch.device(accelerator.device_name(None if accelerator.device_name() == "cpu" else local_rank))
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def leave_ranks() -> None:
    """Leave the process group, if there is one; without this, a rank that ends late complains of the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def hardware(ranks: Ranks) -> Hardware:
    """Describe what the run computes on."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return Hardware(
        world_size=ranks.world_size,
        device=ranks.device.type,
        bf16=accelerator.is_bf16_supported(),
        # Some CPUs compute in fp16, but DeepSpeed refuses to train in it there.
        fp16=accelerator.is_fp16_supported() and ranks.device.type != "cpu",
    )


def memory_bytes(device: torch.device) -> int:
    """Bytes this rank holds now: the allocator's on an accelerator, the process's resident set on the CPU."""
    if device.type == "cpu":
        import psutil

        return psutil.Process().memory_info().rss
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().memory_allocated()


def _share_cores() -> None:
    """Divide the cores among the ranks of this node: each with a thread per core would only be slower."""
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, torch.get_num_threads() // here))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
