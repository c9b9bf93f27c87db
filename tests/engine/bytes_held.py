"""Bytes as seen from outside: what tensors there are, and what the kernel says."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Held:
    """Bytes of distinct storages: of all live tensors, and of the torch optimizer's tensors by kind."""

    live: int
    masters: int
    exp_avg: int
    exp_avg_sq: int

    @classmethod
    def by(cls, engine: Any) -> Held:
        """Count now. Reads the torch optimizer inside ``engine`` and nothing of DeepSpeed's or of ours."""
        gc.collect()
        states = engine.basic_optimizer.state
        # The optimizer of ZeRO-3 holds its tensors in the state only; its groups are empty between steps.
        masters = list(states) or [p for g in engine.basic_optimizer.param_groups for p in g["params"]]
        return cls(
            storage_bytes(live_tensors()),
            storage_bytes(masters),
            storage_bytes(state["exp_avg"] for state in states.values() if "exp_avg" in state),
            storage_bytes(state["exp_avg_sq"] for state in states.values() if "exp_avg_sq" in state),
        )


def live_tensors() -> Iterator[torch.Tensor]:
    """Every tensor that Python can reach, gradients included."""
    for thing in gc.get_objects():
        # type(), because isinstance() asks proxies for their __class__ and some answer with an import.
        if issubclass(type(thing), torch.Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under ``tensors``, each counted once."""
    sizes = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@dataclass
class DeviceMemory:
    """Bytes that the process, or torch's CUDA allocator, has now and had at most since the last ``reset``."""

    now: int
    peak: int

    @classmethod
    def read(cls) -> DeviceMemory:
        """Read the kernel's account of this process, or the allocator's of this rank's GPU.

        What was freed and merely sits in the C library's own lists is given back first: it is nobody's.
        """
        if torch.cuda.is_available():
            return cls(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
        _give_back_free_lists()
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(*(1024 * int(lines[key].split()[0]) for key in ("VmRSS", "VmHWM")))

    @staticmethod
    def reset() -> None:
        """Start the peak anew, from a process that has given back what it can."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        _give_back_free_lists()
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def _give_back_free_lists() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


class Traffic(TorchDispatchMode):
    """Counts what this rank hands to torch.distributed: bytes of tensors in sends, and in everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.collective = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if "send" in func.__name__:
                self.sent += size
            elif "recv" not in func.__name__:
                self.collective += size
        return func(*args, **(kwargs or {}))
