"""Bytes of all live tensors and their highest sum, seen by torch's dispatcher. Imports torch only.

On the CPU nobody else can tell: the C library's allocator keeps no account of tensors, and a process also holds what
is none. What kernels allocate inside one operation is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts while it is active: ``with TensorBytes() as count: ...``; each piece of memory once.

    Attributes:
        now: bytes held.
        peak: most bytes held so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        """Address of the memory under each storage object that was seen."""
        self._objects: Counter[int] = Counter()
        """Storage objects on each piece of memory: DeepSpeed lays several on one flat buffer."""

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count the memory under these."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = address = _address(storage)
            self._objects[address] += 1

    def watch(self, tensors: Any) -> None:
        """Count what hangs in any nesting of lists and dictionaries, from now until it is freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = _address(storage), storage.nbytes()
        self._known[storage._cdata] = address
        self._objects[address] += 1
        if self._objects[address] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, storage: int, size: int) -> None:
        address = self._known.pop(storage)
        self._objects[address] -= 1
        if not self._objects[address]:
            del self._objects[address]
            self.now -= size

    def watch_all(self) -> None:
        """Count every tensor that Python can reach, gradients included."""
        gc.collect()
        self.watch(list(live_tensors()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        self.watch(out)
        return out


def _address(storage: torch.UntypedStorage) -> int:
    """Where the bytes are; fake tensors have none and go by their object."""
    return storage.data_ptr() or storage._cdata


def live_tensors() -> Iterator[torch.Tensor]:
    """Every tensor that Python can reach, and the gradients of leaves."""
    for thing in gc.get_objects():
        # type(), because isinstance() asks proxies for their __class__ and some answer with an import.
        if issubclass(type(thing), torch.Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad
