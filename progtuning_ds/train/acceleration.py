"""Optional ways to compute the same faster: torch.compile and Liger's kernels. No deepspeed.

What cannot work is refused before any weight is loaded.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.integrations.liger import apply_liger_kernel

from progtuning_ds.config import RunConfig
from progtuning_ds.errors import ConfigError, did_you_mean


def check_acceleration(config: RunConfig, shape: PreTrainedConfig, device: str, zero_stage: int) -> None:
    """Raise a ConfigError in one line if the run asks for what this device, model or engine cannot do.

    Args:
        config: the run configuration.
        shape: the model's configuration.
        device: kind of device, such as `cuda`.
        zero_stage: ZeRO stage of the run.
    """
    if config.model.liger:
        _check_liger(shape, device)
    if config.train.compile:
        _check_compile(config.train.compile_backend, zero_stage)


def _check_liger(shape: PreTrainedConfig, device: str) -> None:
    if device != "cuda":
        raise ConfigError(f"model.liger needs a GPU, got ranks on {device}")
    if find_spec("liger_kernel") is None:
        raise ConfigError("model.liger needs Liger's kernels: pip install liger-kernel")
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if shape.model_type not in known:
        raise ConfigError(
            f"model.liger: Liger has no kernels for {shape.model_type}; it has some for {', '.join(sorted(known))}"
        )


def _check_compile(backend: str, zero_stage: int) -> None:
    if zero_stage == 3:
        raise ConfigError(
            "train.compile works with ZeRO stages 0, 1 and 2, got 3, whose hooks gather weights between the layers; "
            "take another stage or leave it out"
        )
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        usual = ", ".join(sorted(torch._dynamo.list_backends()))  # without those that are for debugging
        raise ConfigError(
            f"train.compile_backend must be one of {usual}, got {backend!r}{did_you_mean(backend, known)}"
        )


def use_liger(model: Any) -> None:
    """Give a loaded model Liger's rotary embedding, norms and feed-forward layers, in place.

    Not Liger's loss: tasks compute theirs from logits, which must be there for the scores too.
    """
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def compile_engine(engine: Any, backend: str) -> None:
    """Let an engine run its module by torch.compile.

    Where a stage boundary changes what requires grad, torch's guards notice and the next step is compiled anew; each
    stage, and evaluation beside training, has graphs of its own.
    """
    # Graphs of all stages stay; what is over torch's limit would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    engine.compile(backend=backend, compile_kwargs={"dynamic": True})
