"""Which implementation of the step runs: an explicit decision, logged once. Imports Triton only where it is chosen."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
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
OLDEST_TRITON = (3, 6)
"""Older ones flush subnormal numbers in division and square root (3.5), or do not compile the kernels (3.4)."""


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
            AdamW, for fp32 masters and state) or "auto": "triton" for tensors on a CUDA device if a Triton
            that is new enough is installed, else "fused_cpu" where it has the variant, else "reference".
        buffer: one of the step's buffers, which are all of one variant.

    Raises:
        ValueError: another word, or an implementation that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(str(impl), IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}{hint}")
    name = _automatic(buffer) if impl == "auto" else impl
    if name == "triton" and (lacks := lacking_triton()):
        raise ValueError(f'impl must not be "triton" here: {lacks}')
    if name == "triton" and buffer.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError('impl must not be "triton" for tensors on the CPU, but in Triton\'s interpreter')
    if name == "fused_cpu" and not fused_cpu.supports(buffer):
        raise ValueError('impl must not be "fused_cpu" but for fp32 masters and fp32 state on the CPU')
    _log_once(name, impl, buffer.device.type)
    return _operations(name, buffer.eight_bit)


def _automatic(buffer: FlatBuffer) -> str:
    if buffer.device.type == "cuda":
        lacks = lacking_triton()
        if lacks is None:
            return "triton"
        logger.warning("The fused kernels do not run: %s; plain PyTorch does their work, slowly", lacks)
    return "fused_cpu" if fused_cpu.supports(buffer) else "reference"


@lru_cache
def lacking_triton() -> str | None:
    """Say why Triton cannot run the kernels, or return None if it can."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; pip install 'triton>={oldest}'"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old, {oldest} or newer is needed"
    return None


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
