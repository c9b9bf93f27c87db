"""The optimizer's whole step in one pass, in place of DeepSpeed's own: one file per ZeRO flavour that has it.

Owns which engines can take it. What a step computes is `progtuning_kernels`'s.
"""

from __future__ import annotations

import logging

import deepspeed
import torch

from progtuning_ds.errors import did_you_mean
from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.fused.adamw import why_not_adamw
from progtuning_ds.zero.fused.stage3 import Stage3Step
from progtuning_ds.zero.fused.stage12 import Stage12Step
from progtuning_ds.zero.fused.step import FusedStep
from progtuning_ds.zero.stage3 import Stage3Adapter
from progtuning_ds.zero.stage12 import Stage12Adapter

__all__ = ["KERNELS", "FusedStep", "take_over_step"]

logger = logging.getLogger(__name__)

KERNELS = ("auto", "triton", "reference", "deepspeed")
"""Who does the optimizer step: the best implementation for the device, Triton's, plain PyTorch's, or DeepSpeed."""


def take_over_step(adapter: Adapter, kernel: str) -> FusedStep | None:
    """Make the engine's ``optimizer.step`` the fused one, on this instance alone; the decision is logged.

    Args:
        adapter: of the live engine.
        kernel: one of ``KERNELS``. "deepspeed" changes nothing; so does "auto" where there is no fused step.

    Returns:
        The step, or None where DeepSpeed does it.

    Raises:
        ValueError: for another word, or "triton" or "reference" where the engine or its optimizer has no fused step.
    """
    if kernel not in KERNELS:
        raise ValueError(
            f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}{did_you_mean(str(kernel), KERNELS)}"
        )
    if kernel == "deepspeed":
        return None
    lacks = _why_not(adapter)
    if lacks and kernel != "auto":
        raise ValueError(f"kernel must be deepspeed here, got {kernel!r}: {lacks}")
    if lacks:
        logger.warning("Optimizer step: DeepSpeed's own (kernel='auto'), because %s", lacks)
        return None
    step = _step_class(adapter)(adapter, kernel)
    logger.info("Optimizer step: fused, implementation %r (kernel=%r)", step.implementation, kernel)
    return step


def _step_class(adapter: Adapter) -> type[FusedStep]:
    return Stage12Step if isinstance(adapter, Stage12Adapter) else Stage3Step


def _why_not(adapter: Adapter) -> str | None:
    zero = adapter.wrapper
    if not isinstance(adapter, (Stage12Adapter, Stage3Adapter)):
        return f"there is a fused step for ZeRO-1, 2 and 3, and none for {type(zero).__name__}"
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        return "with optimizer offload the host updates, with DeepSpeedCPUAdam"
    missing = [name for name in _step_class(adapter).REQUIRED if not hasattr(zero, name)]
    if missing:
        return f"{type(zero).__name__} of DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}"
    if getattr(zero, "torch_autocast_gradscaler", None):
        return "torch.amp's GradScaler wants to call the optimizer itself"
    if any(master.dtype != torch.float32 for master in adapter.master_tensors()):
        return "the fused step needs fp32 masters, and the configuration keeps them in 16 bits"
    return why_not_adamw(adapter.torch_optimizer)
