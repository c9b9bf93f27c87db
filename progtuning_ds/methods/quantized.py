"""Bases stored in 4 or 8 bits by bitsandbytes. May import torch, transformers and bitsandbytes; no deepspeed."""

from __future__ import annotations

from typing import Any

import torch

from progtuning_ds.methods.settings import Method


def quantized_loading(method: Method | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the base while it is read; none where it stays as it is.

    What is quantized are linear layers; embeddings, norms and the task's head keep ``dtype``, in which quantized
    layers compute as well (QLoRA, arXiv 2305.14314).
    """
    if method is None or method.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if method.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=method.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    }
