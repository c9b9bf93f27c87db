"""Bases stored in 4 or 8 bits by bitsandbytes. May import torch, transformers and bitsandbytes; no deepspeed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from progtuning_ds.methods.frozen_linear import is_plain_linear, outputs_and_inputs
from progtuning_ds.methods.heads import head_modules
from progtuning_ds.methods.settings import Method


def unquantized_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that are never quantized: the task's head, which trains, and the output embeddings."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [*head_modules(model), *(name for name, module in model.named_modules() if module is output)]


def base_matrices(model: nn.Module, frozen: Collection[str], skip: Collection[str]) -> dict[str, tuple[int, int]]:
    """Names of the linear layers' weights that a quantized base holds as codes, with (outputs, inputs).

    Args:
        model: not quantized, its method applied.
        frozen: names of its parameters that never train.
        skip: of the bare model; see `unquantized_modules`.
    """
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        bare = path.removeprefix("base_model.model.")  # PEFT's wrapping
        if f"{path}.weight" not in frozen or any(bare == name or bare.startswith(f"{name}.") for name in skip):
            continue
        if is_plain_linear(module):
            found[f"{path}.weight"] = outputs_and_inputs(module)
    return found


def held_by_quantized(model: nn.Module) -> Iterator[torch.Tensor]:
    """What quantized layers of a base hold beside their parameters: scales, tables, and codes that int8 keeps whole."""
    for module in model.modules():
        weight = module._parameters.get("weight")  # not the attribute, which some layers make anew for each reader
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]
            yield from (state.absmax, state.code, *nested)
        for owner in (weight, getattr(module, "state", None)):
            held = (getattr(owner, name, None) for name in ("CB", "SCB"))
            yield from (tensor for tensor in held if isinstance(tensor, torch.Tensor))


def keep_trainable(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weight in evaluation, which would cut gradients off in training.

    On CPUs with AVX512-BF16, bitsandbytes (``nn/modules.py``, ``Linear4bit.forward``) changes a weight's layout for
    good at the first forward in evaluation mode, and uses an operation without backward from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def misread_inputs(model: nn.Module) -> list[int]:
    """Numbers of inputs whose 4-bit layers in ``model`` this processor reads wrongly; none on a GPU.

    With AVX512, bitsandbytes 0.50 (``backends/cpu/ops.py``, ``dequantize_4bit``) gives blocks of 64 wrong scales where
    they go beyond the end of a row: for inputs that are a multiple of 16 and none of 64. Tried here, not assumed.
    """
    from bitsandbytes.nn import Linear4bit

    layers = (module for module in model.modules() if isinstance(module, Linear4bit))
    widths = {layer.in_features for layer in layers if layer.weight.device.type == "cpu"}
    return sorted(width for width in widths if _is_misread(width))


def _is_misread(inputs: int) -> bool:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    block = 64  # as many rows make whole blocks, whatever the inputs
    rows = torch.linspace(-1, 1, block * inputs).view(block, inputs)
    wide, narrow = (dequantize_4bit(*quantize_4bit(rows.view(-1, n), quant_type="nf4")) for n in (inputs, block))
    return not torch.equal(wide.view(-1), narrow.view(-1))


def quantized_loading(method: Method | None, dtype: torch.dtype, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the base while it is read; none where it stays as it is.

    What is quantized are linear layers; embeddings, norms and the task's head keep ``dtype``, in which quantized
    layers compute as well (QLoRA, arXiv 2305.14314).

    Args:
        method: the method, or None.
        dtype: of what is not quantized.
        skip: names of modules to leave out; see `unquantized_modules`.
    """
    if method is None or method.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if method.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=list(skip),
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=method.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    }
