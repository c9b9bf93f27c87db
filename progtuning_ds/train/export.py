"""Writes the trained model in Hugging Face's own format. Uses deepspeed's public API only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from progtuning_ds.blocks import persistent_buffers
from progtuning_ds.methods.bottleneck import bottleneck_state, save_bottlenecks
from progtuning_ds.methods.peft_based import quiet_peft


def save_final(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, is_first: bool) -> None:
    """Save weights as safetensors, with configuration and tokenizer, so that `from_pretrained` loads them.

    What PEFT has wrapped is saved in PEFT's format, for `PeftModel.from_pretrained` on the base model; bottleneck
    adapters likewise, for `progtuning_ds.methods.load_bottlenecks`.

    Collective: under ZeRO-3 every rank takes part in gathering the weights. Only the first rank writes.

    Args:
        model: the bare module of the engine.
        tokenizer: saved beside it.
        folder: created if needed.
        is_first: whether this rank writes.
    """
    state = full_state_dict(model, keep=is_first)
    if is_first:
        adapters = getattr(model, "bottleneck_config", None)
        if adapters is None:
            model.save_pretrained(folder, state_dict=state, **_names_as_they_are(model))
        else:
            save_bottlenecks({name: state[name] for name in bottleneck_state(model, adapters)}, adapters, folder)
        tokenizer.save_pretrained(folder)


def _names_as_they_are(model: PreTrainedModel) -> dict[str, Any]:
    """Keep transformers from renaming to what a model was called before it was renamed while loading.

    Under ZeRO-3 it would write `LayerNorm.gamma` for a base model whose file says `LayerNorm.weight`: it takes every
    renaming it knows for one that was needed. PEFT's own `save_pretrained` renames nothing and knows no such argument.
    """
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return {"save_original_format": False} if sharded and not isinstance(model, PeftModel) else {}


def save_merged(
    base: PreTrainedModel, adapters: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PreTrainedModel:
    """Merge saved PEFT adapters into ``base`` and save the whole, which loads without PEFT. On one rank.

    Args:
        base: freshly loaded, unquantized and on the CPU.
        adapters: what `save_final` wrote.
        tokenizer: saved beside it.
        folder: created if needed.
    """
    with quiet_peft():
        model = PeftModel.from_pretrained(base, str(adapters))
    for path, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # PEFT 0.21 would do so later, in a way that fails for IA3 where a head has several layers.
            head = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(path, head)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return merged


def full_state_dict(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return complete weights and buffers on the CPU, gathered one parameter at a time. Collective under ZeRO-3.

    Args:
        model: the bare module; its parameters may be partitioned.
        keep: whether this rank keeps them; elsewhere the result is empty, so that one copy is in memory.
    """
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    if keep:
        # What is in a state dict beside parameters; a quantized layer under ZeRO-3 could not make one. Tied names
        # appear once, as on the hub.
        state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(model)}
    return state
