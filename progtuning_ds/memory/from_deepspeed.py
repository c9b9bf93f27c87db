"""Reads a complete DeepSpeed configuration as the model of memory sees it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from progtuning_ds.memory.setup import EngineSetup

_BITS = {"none": 16, "int8": 8, "nf4": 4}


def setup_from_deepspeed(
    content: Mapping[str, Any],
    world_size: int,
    *,
    kernel: str = "deepspeed",
    state_bits: int = 32,
    quantization: str = "none",
    double_quant: bool = True,
) -> EngineSetup:
    """Return the engine that a complete configuration (no ``"auto"``) describes, with DeepSpeed's own defaults.

    Args:
        content: as ``deepspeed.initialize`` gets it.
        world_size: data-parallel ranks.
        kernel: ``deepspeed`` or ``fused``.
        state_bits: bits of a moment, 32 or 8.
        quantization: of the base under adapters, as ``Method`` says it.
        double_quant: whether scales of nf4 are quantized as well.
    """
    zero = content.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))
    precision = next((name for name in ("bf16", "fp16") if (content.get(name) or {}).get("enabled")), "fp32")
    return EngineSetup(
        zero_stage=stage,
        world_size=world_size,
        precision=precision,
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_param=_offloads(zero, "offload_param"),
        fp32_gradients=(content.get("data_types") or {}).get("grad_accum_dtype") == "fp32",
        kernel=kernel if stage > 0 else "deepspeed",
        state_bits=state_bits,
        frozen_bits=_BITS[quantization],
        double_quant=double_quant,
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap_comm=bool(zero.get("overlap_comm")) and stage in (1, 2),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        max_live=min(
            int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
            int(zero.get("stage3_max_reuse_distance", 1_000_000_000)),
        ),
        sub_group=int(zero.get("sub_group_size", 1_000_000_000)),
    )


def deepspeed_zero(setup: EngineSetup) -> dict[str, Any]:
    """Write the section ``zero_optimization`` of a DeepSpeed JSON that gives this engine."""
    zero: dict[str, Any] = {"stage": setup.zero_stage}
    if setup.zero_stage == 0:
        return zero
    zero |= {
        "overlap_comm": True if setup.zero_stage == 3 else setup.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": setup.reduce_bucket,
    }
    if setup.zero_stage == 3:
        zero |= {
            "sub_group_size": setup.sub_group,
            "stage3_prefetch_bucket_size": setup.prefetch_bucket,
            "stage3_param_persistence_threshold": setup.persistence_threshold,
            "stage3_max_live_parameters": setup.max_live,
            "stage3_max_reuse_distance": setup.max_live,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    for name, wanted in (("offload_optimizer", setup.offload_optimizer), ("offload_param", setup.offload_param)):
        if wanted:
            zero[name] = {"device": "cpu", "pin_memory": True}
    return zero


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device") not in (None, "none")
