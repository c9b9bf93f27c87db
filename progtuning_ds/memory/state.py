"""Closed formulas for the bytes a rank holds: masters, moments and gradient buffers of what trains.

Owns the arithmetic, padding included; imports the standard library and ``layout`` only. ``StageEngine.memory()``
measures the same categories on a live engine.

The accounting is ZeRO's (arXiv 1910.02054, section 3.1): with Adam, each trained element costs 12 bytes of fp32 state
(master, exp_avg, exp_avg_sq), divided among the ranks from ZeRO-1 on. What differs between flavours is who pads what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from progtuning_ds.layout import padded_numel, shard_numel

FP32_BYTES = 4
BIT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Flavour:
    """How an engine holds state.

    Attributes:
        zero_stage: 0 to 3.
        world_size: ranks that share the state.
        bit16: weights are bf16 or fp16; in fp32 a stage-0 engine has no separate master.
        offload_optimizer: masters, moments and their gradients live in host memory.
        fp32_gradients: gradients accumulate in fp32 (``data_types.grad_accum_dtype``).
    """

    zero_stage: int
    world_size: int
    bit16: bool
    offload_optimizer: bool = False
    fp32_gradients: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")


def owned_numel(groups: Sequence[Sequence[int]], flavour: Flavour) -> int:
    """Elements of optimizer state one rank owns, padding included; every rank owns the same number.

    Args:
        groups: sizes of the trained parameters in each parameter group.
        flavour: how state is held.
    """
    if flavour.zero_stage == 0:
        return sum(sum(group) for group in groups)
    if flavour.zero_stage == 3:
        return sum(shard_numel(numel, flavour.world_size) for group in groups for numel in group)
    return sum(padded_numel(sum(group), flavour.world_size) // flavour.world_size for group in groups)


def state_bytes(groups: Sequence[Sequence[int]], flavour: Flavour) -> dict[str, int]:
    """Bytes one rank holds between two optimizer steps, per category, once every group has stepped with Adam.

    Args:
        groups: sizes of the trained parameters in each parameter group.
        flavour: how state is held.

    Returns:
        ``master_weights``, ``exp_avg`` and ``exp_avg_sq``.
    """
    owned = owned_numel(groups, flavour)
    has_master = flavour.bit16 or flavour.zero_stage > 0
    return {
        "master_weights": FP32_BYTES * owned if has_master else 0,
        "exp_avg": FP32_BYTES * owned,
        "exp_avg_sq": FP32_BYTES * owned,
    }


def gradient_bytes(groups: Sequence[Sequence[int]], flavour: Flavour) -> int:
    """Bytes of gradient buffers that ZeRO-3 and BF16_Optimizer keep on each rank between two optimizer steps.

    ZeRO-0, 1 and 2 keep none on the device; with offload, ZeRO-2 and 3 keep fp32 gradients of what the rank owns in
    host memory. Buckets of fixed size (``reduce_bucket_size``) are not counted: no transition changes them.
    """
    owned = owned_numel(groups, flavour)
    if flavour.zero_stage == 3:
        element = BIT16_BYTES if flavour.bit16 and not flavour.fp32_gradients else FP32_BYTES
        return owned * element + (owned * FP32_BYTES if flavour.offload_optimizer else 0)
    if flavour.zero_stage == 1 and flavour.bit16 and flavour.fp32_gradients:
        return FP32_BYTES * sum(padded_numel(sum(group), flavour.world_size) for group in groups)
    return FP32_BYTES * owned if flavour.offload_optimizer else 0
