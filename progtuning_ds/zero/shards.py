"""Where the shards of ZeRO-3 parameters lie in memory, and how several become one flat tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from progtuning_ds.transfer import drain
from progtuning_ds.zero.adapter import Parameter

if TYPE_CHECKING:
    from progtuning_ds.zero.stage3 import SubGroup


def owns_storage(param: Parameter) -> bool:
    """True if nothing else lives in the storage of this rank's shard of ``param``."""
    shard = param.ds_tensor
    return shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()


def adjacent_runs(params: list[Parameter]) -> list[list[Parameter]]:
    """Cut ``params`` into runs whose shards lie end to end in one storage."""
    runs: list[list[Parameter]] = []
    for param in params:
        if runs and _follows(runs[-1][-1].ds_tensor, param.ds_tensor):
            runs[-1].append(param)
        else:
            runs.append([param])
    return runs


def _follows(shard: torch.Tensor, other: torch.Tensor) -> bool:
    same = shard.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and shard.storage_offset() + shard.numel() == other.storage_offset()


def view_of(params: list[Parameter]) -> torch.Tensor:
    """One 1-D tensor over shards that lie end to end."""
    first = params[0].ds_tensor
    numel = sum(p.partition_numel() for p in params)
    return torch.as_strided(first.detach(), (numel,), (1,), first.storage_offset())


def separate(subs: Sequence[SubGroup], whole: torch.Tensor | None) -> None:
    """Give every sub-group a storage of its own, through host memory; its tensors stay the objects that they are.

    Args:
        subs: all sub-groups.
        whole: the one buffer that DeepSpeed made for all of them (``stage3.py``, ``lp_param_buffer``); left empty.
    """
    staged = [sub.weights.detach().to("cpu", copy=True) for sub in subs]
    flats = [[sub.weights, sub.master] if sub.aliased else [sub.weights] for sub in subs]
    shards = [param.ds_tensor for sub in subs for param in sub.params]
    for view in [*([] if whole is None else [whole]), *(flat for own in flats for flat in own), *shards]:
        view.data = torch.empty(0, dtype=view.dtype, device=view.device)
    for sub, own, values in zip(subs, flats, staged, strict=True):
        weights = values.to(sub.weights.device)
        for flat in own:
            flat.data = weights
        _lay_out(sub.params, weights)


def gathered(params: list[Parameter]) -> torch.Tensor:
    """Move shards that have storages of their own into one flat tensor, through host memory."""
    first = params[0].ds_tensor
    staged = torch.empty(sum(p.partition_numel() for p in params), dtype=first.dtype)
    offset = 0
    for param in params:
        shard = param.ds_tensor
        drain(shard.view(-1), staged.narrow(0, offset, shard.numel()))
        offset += shard.numel()
        shard.data = torch.empty(0, dtype=shard.dtype, device=shard.device)
    flat = staged.to(first.device)
    _lay_out(params, flat)
    return flat


def _lay_out(params: Sequence[Parameter], flat: torch.Tensor) -> None:
    """Make the shards of ``params`` views of ``flat``, end to end."""
    offset = 0
    for param in params:
        numel = param.partition_numel()
        param.ds_tensor.data = flat.narrow(0, offset, numel)
        offset += numel
