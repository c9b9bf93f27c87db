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
from progtuning_ds.methods.frozen_linear import frozen_layers, scales_of
from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.cut_state import BLOCK_SCALES, blockwise_keys
from progtuning_ds.zero.held_state import HeldBuffer, held_buffers, replicas, weight_shares
from progtuning_ds.zero.hyper_state import plain_state

SCALES = "frozen."


@dataclass(frozen=True)
class RankState:
    """What one rank saves: tensors by name, not yet copied, and a description of them in JSON values.

    Attributes:
        tensors: what changes from step to step.
        settled: weights that no further step of the plan changes, by the stage from which on that is so.
        described: what both hold.
    """

    tensors: dict[str, torch.Tensor]
    settled: dict[int, dict[str, torch.Tensor]]
    described: dict[str, Any]


def rank_state(stages: StageEngine) -> RankState:
    """What this rank saves: its share of weights, masters and optimizer state, its generators and module buffers.

    All ranks together hold every element of every parameter exactly once. Padding of flat buffers goes along.

    Raises:
        TypeError: for optimizer state that is neither a tensor nor a plain value.
    """
    adapter = stages.adapter
    tensors: dict[str, torch.Tensor] = {}
    settled: dict[int, dict[str, torch.Tensor]] = {}
    weights: list[list[Any]] = []
    settled_weights: dict[int, list[list[Any]]] = {}
    since = _settled_since(stages)
    for share in weight_shares(adapter):
        tensor, stage = f"weights.{share.name}", since.get(share.name)
        into, rows = (
            (tensors, weights)
            if stage is None
            else (settled.setdefault(stage, {}), settled_weights.setdefault(stage, []))
        )
        into[tensor] = _flat(share.tensor)[: share.numel]
        rows.append([tensor, share.name, share.start, share.numel])
    buffers = [
        _buffer(adapter, index, buffer, tensors)
        for index, buffer in enumerate(held_buffers(adapter))
        if index % replicas(adapter) == adapter.ranks.rank % replicas(adapter)
    ]
    for name, tensor in _module_buffers(stages).items():
        tensors[f"module.{name}"] = tensor
    if adapter.ranks.rank == 0:  # whole on every rank
        tensors |= scale_tensors(stages.engine.module)
    tensors |= rng_tensors()
    described = {
        "weights": weights,
        "settled": {str(stage): rows for stage, rows in sorted(settled_weights.items())},
        "buffers": buffers,
        "rng": encode(rng_values(), "rng"),
    }
    return RankState(tensors, dict(sorted(settled.items())), described)


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
        "on_freeze": stages.on_freeze,
        "plain": encode(plain_state(adapter)),
    }


def scale_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What beside its codes makes up each weight that was quantized when its block froze, by name in a file."""
    return {
        f"{SCALES}{name}.{key}": tensor
        for name, layer in frozen_layers(module)
        for key, tensor in scales_of(layer).items()
    }


def _settled_since(stages: StageEngine) -> dict[str, int]:
    """From which stage on a parameter has its last value; only those for which that stage has begun.

    A hint: whether the value is what it was is looked at when it is saved.
    """
    plan, blocks = stages.plan, stages.blocks
    since = dict.fromkeys(stages.adapter.params, 0)
    for stage in plan.stages:
        since |= dict.fromkeys(blocks.trainable_names(stage, plan.always_train), stage.index + 1)
    held = {name for group in stages.adapter.groups() for name in group}
    return {name: stage for name, stage in since.items() if stage <= stages.stage.index and name not in held}


def _buffer(adapter: Adapter, index: int, buffer: HeldBuffer, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Describe one buffer and add its tensors.

    State that is not laid out like its master, such as 8-bit statistics, is kept whole with everything beside it
    (`opaque`): it can only go back into the very same buffer.
    """
    master, state = buffer.master, adapter.torch_optimizer.state.get(buffer.master, {})
    tensor_state = {key: value for key, value in state.items() if torch.is_tensor(value)}
    codes = blockwise_keys(tensor_state)
    scales = {BLOCK_SCALES[key] for key in codes}  # of a buffer of one block they are one element, like a step count
    big = {
        key: value
        for key, value in tensor_state.items()
        if value.numel() > 1 or value.shape == master.shape or key in scales
    }
    opaque = bool(codes) or any(value.numel() != master.numel() for value in big.values())
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
