"""``engine.offload_states`` and ``reload_states`` for ZeRO-3 weights, right also when some parameters are frozen.

DeepSpeed maps the weights of the whole model to one buffer of what trains and, on the way back, restores only what
trains (``stage3.py``, ``offload_states``): frozen shards would stay on the CPU with other parameters' values, or the
call fails. Here every storage that holds shards moves as it is, and every view follows.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

from progtuning_ds.errors import UnsupportedDeepSpeedError

_WEIGHTS = OffloadStateTypeEnum.lp_params


def follow_frozen_weights(wrapper: Any) -> None:
    """Replace both methods on one ZeRO-3 optimizer instance; what is not weights is left to the originals."""
    if not hasattr(wrapper, "offloaded_states"):
        raise UnsupportedDeepSpeedError(f"{type(wrapper).__name__} lacks offloaded_states")
    offload, reload = wrapper.offload_states, wrapper.reload_states

    def offload_states(
        include: Container[Any] | None = None,
        device: Any = None,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        wanted = [state for state in OffloadStateTypeEnum if include is None or state in include]
        if _WEIGHTS in wanted and _WEIGHTS not in wrapper.offloaded_states:
            wrapper.empty_partition_cache()
            _move(_shards(wrapper), torch.device("cpu"), pin_memory)
            wrapper.offloaded_states.add(_WEIGHTS)
        others = [state for state in wanted if state != _WEIGHTS]
        if others:
            offload(include=others, device=device, pin_memory=pin_memory, non_blocking=non_blocking)

    def reload_states(non_blocking: bool = False) -> None:
        if _WEIGHTS in wrapper.offloaded_states:
            _move(_shards(wrapper), torch.device(get_accelerator().current_device_name()), pin_memory=False)
            wrapper.offloaded_states.remove(_WEIGHTS)
        reload(non_blocking=non_blocking)

    wrapper.offload_states, wrapper.reload_states = offload_states, reload_states


def _shards(wrapper: Any) -> list[torch.Tensor]:
    """Every tensor that is a view of weights on this rank."""
    views = [param.ds_tensor for param in wrapper.module.parameters()]
    views += [flat for flat in wrapper.fp16_partitioned_groups_flat if flat is not None]
    buffer = getattr(wrapper, "lp_param_buffer", None)
    return views if buffer is None else [*views, buffer]


def _move(views: Iterable[torch.Tensor], device: torch.device, pin_memory: bool) -> None:
    moved: dict[int, torch.Tensor] = {}
    for view in views:
        storage = view.untyped_storage()
        if view.numel() == 0:
            continue
        key = storage.data_ptr()
        if key not in moved:
            whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(storage)
            target = torch.empty(whole.shape, dtype=whole.dtype, device=device)
            target = get_accelerator().pin_memory(target) if pin_memory else target
            moved[key] = target.copy_(whole)
        view.data = moved[key].as_strided(view.size(), view.stride(), view.storage_offset())
