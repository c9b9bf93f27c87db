"""What the stage engine does not support, refused by name when it is built, before any state is touched."""

from __future__ import annotations

from typing import Any

import deepspeed
from packaging.version import Version

from progtuning_ds.errors import UnsupportedDeepSpeedError

_SEVERAL_DTYPES = Version("0.19.4")
_ONE_BIT = ("OnebitAdam", "OnebitLamb", "ZeroOneAdam")


def refuse_unsupported(engine: Any) -> None:
    """Raise ``UnsupportedDeepSpeedError`` naming the first feature in use that cannot be retargeted.

    Raises:
        UnsupportedDeepSpeedError: see ``_reasons`` for the list.
    """
    for in_use, reason in _reasons(engine):
        if in_use:
            raise UnsupportedDeepSpeedError(f"StageEngine does not support {reason}")


def refuse_several_dtypes(what: str) -> None:
    """Raise for ``what`` under ZeRO-3, which gathers codes beside weights, on a DeepSpeed that mixes them up.

    Older ones gather parameters of several dtypes in another order on every rank (``partition_parameters.py``,
    ``all_gather_coalesced``), or into buffers of the first one's dtype (``_allgather_params_coalesced``).

    Raises:
        UnsupportedDeepSpeedError: always, before version 0.19.4.
    """
    if Version(deepspeed.__version__) < _SEVERAL_DTYPES:
        raise UnsupportedDeepSpeedError(
            f"{what} under ZeRO-3 needs DeepSpeed {_SEVERAL_DTYPES} or newer, got {deepspeed.__version__}, which mixes "
            f"up parameters of several dtypes when it gathers them; use ZeRO-1 or 2"
        )


def _reasons(engine: Any) -> list[tuple[bool, str]]:
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    zero = engine._config.zero_config
    return [
        (optimizer is None, "an engine without an optimizer; pass model_parameters to deepspeed.initialize"),
        (type(engine).__name__ == "PipelineEngine", "the pipeline engine; use ZeRO instead of pipeline stages"),
        (type(inner).__name__ in _ONE_BIT, f"1-bit optimizers ({type(inner).__name__}); use AdamW"),
        ("muon" in type(inner).__name__.lower(), "the Muon optimizer; use AdamW"),
        (bool(getattr(optimizer, "zenflow", False)), "ZenFlow; remove zero_optimization.zenflow"),
        (bool(getattr(zero, "mics_shard_size", -1) > 0), "MiCS; remove zero_optimization.mics_shard_size"),
        (
            bool(getattr(zero, "zero_hpz_partition_size", 1) > 1),
            "hpZ; set zero_optimization.zero_hpz_partition_size to 1",
        ),
        *(
            (bool(getattr(zero, name, False)), f"ZeRO++ quantization; set zero_optimization.{name} to false")
            for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
        ),
        (_active(engine, "is_deepcompile_active"), "DeepCompile; set compile.deepcompile to false"),
        (bool(getattr(engine, "has_moe_layers", False)), "mixture-of-experts layers"),
        (_nvme(zero), "NVMe offload; offload to cpu instead"),
        (hasattr(optimizer, "backup_optimizer"), "partial optimizer offload; set offload_optimizer.ratio to 1"),
        (
            bool(getattr(optimizer, "parameter_alignment", False)),
            "zero_optimization.parameter_alignment; set it to false",
        ),
        (
            getattr(engine, "mp_world_size", 1) > 1,
            f"tensor parallelism (world size {getattr(engine, 'mp_world_size', 1)})",
        ),
        (_active(engine, "amp_enabled"), "apex amp; use bf16 or fp16"),
        (type(optimizer).__name__ == "LoRAOptimizer", "OptimizedLinear"),
    ]


def _active(engine: Any, name: str) -> bool:
    method = getattr(engine, name, None)
    return bool(method and method())


def _nvme(zero: Any) -> bool:
    settings = (zero.offload_optimizer, zero.offload_param)
    return any(s is not None and getattr(s.device, "value", s.device) == "nvme" for s in settings)
