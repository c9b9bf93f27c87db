"""Python values as JSON without loss: tuples, integer keys, counters and single-element tensors survive.

Owns the encoding of everything in a checkpoint that is no tensor. Knows torch; no deepspeed. Nothing that is read
can run code.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

_TUPLE, _ITEMS, _COUNTER, _SCALAR, _FLOAT = "__tuple__", "__items__", "__counter__", "__scalar__", "__float__"


def encode(value: Any, where: str = "state") -> Any:
    """Return a value that JSON can carry and `decode` turns back.

    Raises:
        TypeError: naming `where` and the type, for a value that is not plain.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return _mapping(value, where)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        kind = str(value.dtype).removeprefix("torch.")
        return {_SCALAR: encode(value.item(), where), "dtype": kind, "host": value.device.type == "cpu"}
    if hasattr(value, "item") and hasattr(value, "dtype"):  # a number of numpy
        return encode(value.item(), where)
    raise TypeError(f"{where} cannot be saved: {type(value).__name__} is no plain value")


def decode(value: Any, device: torch.device | str = "cpu") -> Any:
    """Return what was encoded; tensors that were on an accelerator are made on `device`."""
    if isinstance(value, list):
        return [decode(item, device) for item in value]
    if not isinstance(value, dict):
        return value
    if _TUPLE in value:
        return tuple(decode(item, device) for item in value[_TUPLE])
    if _FLOAT in value:
        return float(value[_FLOAT])
    if _SCALAR in value:
        dtype = getattr(torch, value["dtype"])
        return torch.tensor(decode(value[_SCALAR]), dtype=dtype, device="cpu" if value["host"] else device)
    for key, kind in ((_ITEMS, dict), (_COUNTER, Counter)):
        if key in value:
            return kind({decode(name): decode(item, device) for name, item in value[key]})
    return {name: decode(item, device) for name, item in value.items()}


def _mapping(value: dict[Any, Any], where: str) -> dict[str, Any]:
    if isinstance(value, Counter) or not all(isinstance(key, str) and not key.startswith("__") for key in value):
        items = [[encode(key, where), encode(item, f"{where}.{key}")] for key, item in value.items()]
        return {_COUNTER if isinstance(value, Counter) else _ITEMS: items}
    return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
