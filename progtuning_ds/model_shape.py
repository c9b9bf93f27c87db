"""Reads from a model, weights or none, what the model of memory needs. May import torch and transformers; no deepspeed.

Sizes of parameters are exact. The architecture is read from the configuration and the modules of the first block; for
a family that is not in ``TESTED`` it is the nearest of the known patterns.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from progtuning_ds.blocks import BlockMap, full_numel, full_shape
from progtuning_ds.memory import Architecture, Param, ParamTable
from progtuning_ds.methods import base_matrices
from progtuning_ds.methods.frozen_linear import freezable

TESTED = ("bert", "gpt2", "llama", "mistral", "qwen2")
"""Families whose activations are compared with what autograd saves."""
_NORM_LAST = frozenset(
    {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "camembert", "deberta", "deberta-v2", "bart", "mpnet"}
)
_COMPOSED = frozenset({"gelu_new", "gelu_fast", "quick_gelu", "gelu_python", "mish"})
_GATES = ("gate_proj", "gate_up_proj", "wi_1", "gate")
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_HIDDEN_DROPOUT = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout", "dropout_rate")


def param_table(model: nn.Module, blocks: BlockMap, unquantized: Sequence[str] = ()) -> ParamTable:
    """Sizes of all parameters by component; biases and norm weights do not decay, as in ``param_groups``.

    Args:
        model: a method may have been applied to it.
        blocks: its blocks.
        unquantized: modules of the bare model that no method quantizes; see ``methods.unquantized_modules``.
    """
    matrices = freezable(model, blocks)
    base = base_matrices(model, blocks.frozen, unquantized)
    return ParamTable(
        tuple(
            Param(
                name=name,
                numel=full_numel(parameter),
                component=blocks.component_of(name),
                decays=len(full_shape(parameter)) >= 2,
                frozen=name in blocks.frozen,
                matrix=matrices.get(name),
                base=base.get(name),
            )
            for name, parameter in model.named_parameters()
        ),
        len(blocks),
    )


def architecture(model: nn.Module, blocks: BlockMap) -> Architecture | None:
    """Describe the blocks of a transformers model; None where the configuration lacks the usual sizes."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config()
    hidden, heads = _first(text, ("hidden_size", "d_model")), _first(text, ("num_attention_heads", "num_heads"))
    if not hidden or not heads:
        return None
    block = _block(model, blocks)
    names = {name.rpartition(".")[2] for name, _ in block.named_modules()}
    classes = {type(module).__name__.lower() for module in block.modules()}
    gated = any(gate in names for gate in _GATES)
    activation = str(_first(text, ("hidden_act", "activation_function", "hidden_activation", "activation")) or "gelu")
    has_lm_head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    training_dropout = {"attention": _ATTENTION_DROPOUT, "hidden": _HIDDEN_DROPOUT}
    dropout = {name: bool(_first(text, fields)) for name, fields in training_dropout.items()}
    return Architecture(
        num_blocks=len(blocks),
        hidden=hidden,
        heads=heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        intermediate=_first(text, ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")) or 4 * hidden,
        vocab=text.vocab_size if has_lm_head else 0,
        norm="rmsnorm" if any("rmsnorm" in name for name in classes) else "layernorm",
        norm_first=text.model_type not in _NORM_LAST,
        mlp="gated" if gated else "gelu_composed" if activation in _COMPOSED else "gelu",
        softmax_fp32=_softmax_in_fp32(block),
        attention_dropout=dropout["attention"],
        hidden_dropout=dropout["hidden"],
        embedding_norm=any("norm" in name.lower() for name in blocks.embeddings),
    )


def _block(model: nn.Module, blocks: BlockMap) -> nn.Module:
    """The first block: the module that owns the longest prefix its parameters share."""
    prefix = blocks.blocks[0][0]
    path = blocks.path.split("+")[0]
    rest = prefix.removeprefix(f"{path}.")
    name = f"{path}.{rest.split('.')[0]}" if rest != prefix else path
    return dict(model.named_modules()).get(name, model)


def _softmax_in_fp32(block: nn.Module) -> bool:
    eager = getattr(sys.modules.get(type(block).__module__), "eager_attention_forward", None)
    try:
        return eager is not None and "dtype=torch.float32" in inspect.getsource(eager)
    except OSError:
        return False


def _first(config: Any, names: tuple[str, ...]) -> Any:
    """The first of several attributes that is set."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
