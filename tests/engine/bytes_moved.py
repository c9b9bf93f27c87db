"""Bytes that tensor operations read and write, as PyTorch's dispatcher sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ONLY_WRITES = {"copy_", "zero_", "fill_", "zeros", "zeros_like", "full", "ones", "empty", "empty_like", "new_zeros"}
_NO_TRAFFIC = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "set_", "resize_", "detach"}


class TensorTraffic(TorchDispatchMode):
    """Counts inside a ``with`` block. Views cost nothing; collectives are not counted: they are the same either way."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_operation: dict[str, int] = {}
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing: what is in here has an account of its own."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def unseen(self, function: Callable[..., None]) -> Callable[..., None]:
        """``function``, run without being counted."""

        def run(*args: Any) -> None:
            with self.paused():
                function(*args)

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if not self._paused and func.namespace == "aten" and name not in _NO_TRAFFIC:
            moved = _fused_adamw(args) if name == "_fused_adamw_" else _moved(func, name, args, kwargs, result)
            self.total += moved
            self.by_operation[name] = self.by_operation.get(name, 0) + moved
        return result


def _fused_adamw(args: Any) -> int:
    """Its schema calls gradients written, for a grad scaler's sake; they are only read here."""
    params, gradients, exp_avgs, exp_avg_sqs = args[:4]
    return 2 * _bytes((params, exp_avgs, exp_avg_sqs)) + _bytes(gradients)


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    written = _written(func, args, kwargs)
    known = {t.untyped_storage().data_ptr() for t in inputs}
    fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in known]
    if not written and not fresh and outputs:
        return 0  # a view
    read = inputs if name not in _ONLY_WRITES else [t for t in inputs if all(t is not w for w in written)]
    return _bytes(read) + _bytes(written) + _bytes(fresh)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    written: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
    return written


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
