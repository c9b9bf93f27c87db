"""The state of a live stage engine as tensors and plain values. No deepspeed.runtime; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from progtuning_ds.blocks import full_shape, persistent_buffers
from progtuning_ds.checkpoint.fragments import MASTER
from progtuning_ds.checkpoint.plain_values import encode
from progtuning_ds.checkpoint.rng import rng_tensors, rng_values
from progtuning_ds.engine import StageEngine
from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.held_state import HeldBuffer, held_buffers, replicas, weight_shares
from progtuning_ds.zero.hyper_state import plain_state


@dataclass(frozen=True)
class RankState:
    """What one rank saves: tensors by name, not yet copied, and a description of them in JSON values."""

    tensors: dict[str, torch.Tensor]
    described: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def rank_state(stages: StageEngine) -> RankState:
    """What this rank saves: its share of weights, masters and optimizer state, its generators and module buffers.

    All ranks together hold every element of every parameter exactly once. Padding of flat buffers goes along.

    Raises:
        TypeError: for optimizer state that is neither a tensor nor a plain value.
    """
    adapter = stages.adapter
    tensors: dict[str, torch.Tensor] = {}
    weights: list[list[Any]] = []
    for share in weight_shares(adapter):
        tensor = f"weights.{share.name}"
        tensors[tensor] = _flat(share.tensor)[: share.numel]
        weights.append([tensor, share.name, share.start, share.numel])
    buffers = [
        _buffer(adapter, index, buffer, tensors)
        for index, buffer in enumerate(held_buffers(adapter))
        if index % replicas(adapter) == adapter.ranks.rank % replicas(adapter)
    ]
    for name, tensor in _module_buffers(stages).items():
        tensors[f"module.{name}"] = tensor
    tensors |= rng_tensors()
    return RankState(tensors, {"weights": weights, "buffers": buffers, "rng": encode(rng_values(), "rng")})


def shared_state(stages: StageEngine) -> dict[str, Any]:
    """What is the same on all ranks, in JSON values: plan and place in it, groups, hyper-parameters, counters."""
    adapter = stages.adapter
    groups = adapter.groups()
    held = {name for group in groups for name in group}
    return {
        "plan": stages.plan.to_dict(),
        "stage": stages.stage.index,
        "groups": groups,
        "masked": sorted(held - set(stages.trainable_names)),
        "shapes": {name: list(full_shape(param)) for name, param in adapter.params.items()},
        "plain": encode(plain_state(adapter)),
    }


def _buffer(adapter: Adapter, index: int, buffer: HeldBuffer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Describe one buffer and add its tensors.

    State that is not laid out like its master, such as 8-bit statistics, is kept whole with everything beside it
    (`opaque`): it can only go back into the very same buffer.
    """
    master, state = buffer.master, adapter.torch_optimizer.state.get(buffer.master, {})
    tensor_state = {key: value for key, value in state.items() if torch.is_tensor(value)}
    big = {key: value for key, value in tensor_state.items() if value.numel() > 1 or value.shape == master.shape}
    opaque = any(value.numel() != master.numel() for value in big.values())
    named = {key: f"buffer{index}.{key}" for key in big}
    kinds = {} if opaque else dict(named)
    tensors |= {named[key]: value if opaque else _flat(value) for key, value in big.items()}
    if not buffer.aliased:
        kinds[MASTER] = f"buffer{index}.{MASTER}"
        tensors[kinds[MASTER]] = _flat(master)
    return {
        "index": index,
        "group": buffer.group,
        "spans": [[span.param, span.start, span.numel, span.offset] for span in buffer.spans],
        "kinds": kinds,
        "opaque": named if opaque else {},
        "scalars": {key: encode(value, f"optimizer state {key!r}") for key, value in state.items() if key not in named},
        "has_state": bool(state),
    }


def _module_buffers(stages: StageEngine) -> dict[str, torch.Tensor]:
    """Persistent buffers of the model, such as running statistics; each rank has its own."""
    return dict(persistent_buffers(stages.engine.module))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1)
