"""What a rank holds, said in parameters: weights, masters and optimizer state, wherever a flavour keeps them.

Owns the way from DeepSpeed's buffers to spans of parameters, for whoever saves and restores them. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from progtuning_ds.layout import Span
from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.flat import FlatAdapter
from progtuning_ds.zero.stage0 import PerParameterAdapter
from progtuning_ds.zero.stage3 import Stage3Adapter


@dataclass(frozen=True)
class HeldBuffer:
    """One tensor the torch optimizer updates on this rank.

    Attributes:
        master: the tensor itself, the key of the optimizer's ``state``; of any shape, contiguous.
        spans: which elements of which parameters it holds; ``offset`` counts elements of the flattened master.
        group: index of its parameter group.
        aliased: True if it is the model's weights themselves and no copy.
    """

    master: torch.Tensor
    spans: tuple[Span, ...]
    group: int
    aliased: bool


@dataclass(frozen=True)
class HeldWeights:
    """A place in which this rank holds elements of a parameter in the model's dtype.

    Attributes:
        name: canonical name of the parameter.
        start: first element of the flattened parameter.
        numel: elements held.
        tensor: the place; the parameter itself, or a 1-D shard that may be padded behind ``numel``.
    """

    name: str
    start: int
    numel: int
    tensor: torch.Tensor


def held_buffers(adapter: Adapter) -> list[HeldBuffer]:
    """What this rank holds of the optimizer, in the order of its buffers."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in adapter.weight_tensors()}
    return [
        HeldBuffer(master, tuple(spans), group, master.untyped_storage().data_ptr() in weights)
        for master, spans, group in _masters(adapter)
    ]


def replicas(adapter: Adapter) -> int:
    """How many ranks hold the same optimizer state: all of them where nothing is partitioned, else one."""
    return adapter.ranks.world_size if _replicated(adapter) else 1


def held_weights(adapter: Adapter) -> list[HeldWeights]:
    """Every place in which this rank holds weights. ZeRO-3 holds small parameters twice: as a shard and whole."""
    if not isinstance(adapter, Stage3Adapter):
        return [HeldWeights(name, 0, param.numel(), param.data) for name, param in adapter.params.items()]
    places = weight_shares(adapter)
    whole = [(name, param) for name, param in adapter.params.items() if param.data.numel() == param.ds_numel]
    return [*places, *(HeldWeights(name, 0, param.ds_numel, param.data) for name, param in whole)]


def weight_shares(adapter: Adapter) -> list[HeldWeights]:
    """This rank's share of the weights, such that all ranks together hold every element exactly once."""
    if isinstance(adapter, Stage3Adapter):
        return [share for name, param in adapter.params.items() if (share := _shard(adapter, name, param)).numel > 0]
    loads = [0] * adapter.ranks.world_size
    mine: list[HeldWeights] = []
    for name, param in adapter.params.items():
        rank = loads.index(min(loads))  # every rank has them all: each saves about as many bytes
        loads[rank] += param.numel()
        if rank == adapter.ranks.rank:
            mine.append(HeldWeights(name, 0, param.numel(), param.data))
    return mine


def settle(adapter: Adapter) -> None:
    """Let links to masters and optimizer state follow, after both were replaced or written to."""
    link = getattr(adapter.wrapper, "_link_all_hp_params", None)
    if link is not None:
        link()


def _masters(adapter: Adapter) -> Iterator[tuple[torch.Tensor, list[Span], int]]:
    if isinstance(adapter, PerParameterAdapter):
        pairs: list[Any] = [(group, pair) for group, members in enumerate(adapter.pairs()) for pair in members]
        for index, (group, (param, master)) in enumerate(pairs):
            yield master, [Span(adapter.names[id(param)], 0, master.numel(), 0, index, 0)], group
        return
    masters = adapter.master_tensors()
    spans: list[list[Span]] = [[] for _ in masters]
    if isinstance(adapter, Stage3Adapter):
        groups: Iterable[int] = [sub.group for sub in adapter.read_subgroups()]
        rank = adapter.ranks.rank
    else:
        assert isinstance(adapter, FlatAdapter), type(adapter).__name__
        groups = range(len(masters))
        rank = adapter.owners.rank
    for span in adapter.layout().owned(rank):
        spans[span.buffer].append(span)
    yield from zip(masters, spans, groups, strict=True)


def _replicated(adapter: Adapter) -> bool:
    if isinstance(adapter, FlatAdapter):
        return adapter.owners.world_size < adapter.ranks.world_size
    return isinstance(adapter, PerParameterAdapter)


def _shard(adapter: Adapter, name: str, param: Any) -> HeldWeights:
    shard = param.ds_tensor
    start = adapter.ranks.rank * shard.numel()
    return HeldWeights(name, start, max(0, min(shard.numel(), param.ds_numel - start)), shard)
