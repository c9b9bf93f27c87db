"""Which implementation of the step runs: an explicit decision, logged once. Imports Triton only where it is chosen."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from progtuning_kernels import fused_cpu, reference
from progtuning_kernels.buffers import FlatBuffer
from progtuning_kernels.control import Control
from progtuning_kernels.worklist import WorkList

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "triton", "reference", "fused_cpu")


class Operations(NamedTuple):
    """The three operations of a step, by one implementation."""

    name: str
    masked_norm_: Callable[[WorkList, torch.Tensor], None]
    finalize_: Callable[[Control], None]
    masked_adamw_: Callable[[WorkList, Control], None]


def choose(impl: str, buffer: FlatBuffer) -> Operations:
    """Decide which implementation runs for buffers like ``buffer``, and log it.

    Args:
        impl: "triton" (the kernels), "reference" (plain PyTorch, the same bits), "fused_cpu" (PyTorch's fused CPU
            AdamW, for fp32 masters and state) or "auto": "triton" for tensors on a CUDA device if Triton is
            installed, else "fused_cpu" where it has the variant, else "reference".
        buffer: one of the step's buffers, which are all of one variant.

    Raises:
        ValueError: another word, or an implementation that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(str(impl), IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}{hint}")
    if impl == "auto":
        if buffer.device.type == "cuda" and has_triton():
            name = "triton"
        else:
            name = "fused_cpu" if fused_cpu.supports(buffer) else "reference"
    else:
        name = impl
    if name == "triton" and not has_triton():
        raise ValueError('impl must not be "triton" where Triton is not installed; pip install triton')
    if name == "fused_cpu" and not fused_cpu.supports(buffer):
        raise ValueError('impl must not be "fused_cpu" but for fp32 masters and fp32 state on the CPU')
    _log_once(name, impl, buffer.device.type)
    return _operations(name, buffer.eight_bit)


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _operations(name: str, eight_bit: bool) -> Operations:
    if name != "triton":
        module = reference if name == "reference" else fused_cpu
        return Operations(name, module.masked_norm_, module.finalize_, module.masked_adamw_)

    def op(module: str, function: str) -> Callable[..., None]:
        return getattr(importlib.import_module(f"progtuning_kernels.{module}"), function)

    adamw = op("masked_adamw_8bit", "masked_adamw_8bit_") if eight_bit else op("masked_adamw", "masked_adamw_")
    return Operations(name, op("masked_norm", "masked_norm_"), op("finalize", "finalize_"), adamw)


@lru_cache
def _log_once(name: str, asked: str, device: str) -> None:
    logger.info("Masked AdamW step: implementation %r on %s tensors (impl=%r)", name, device, asked)
