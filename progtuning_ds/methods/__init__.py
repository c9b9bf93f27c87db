"""Fine-tuning methods: what trains in a model, apart from when. No deepspeed.

A method is applied to a bare model before its blocks are discovered; what then does not require grad never trains.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from progtuning_ds.blocks import discover_blocks, set_trainable
from progtuning_ds.errors import ConfigError
from progtuning_ds.methods.bottleneck import BottleneckConfig, add_bottlenecks, load_bottlenecks
from progtuning_ds.methods.heads import head_modules
from progtuning_ds.methods.quantized import (
    base_matrices,
    held_by_quantized,
    keep_trainable,
    misread_inputs,
    quantized_loading,
    unquantized_modules,
)
from progtuning_ds.methods.settings import KINDS, Method

__all__ = [
    "KINDS",
    "BottleneckConfig",
    "Method",
    "apply_method",
    "base_matrices",
    "blocks_path",
    "check_mergeable",
    "head_modules",
    "held_by_quantized",
    "keep_trainable",
    "load_bottlenecks",
    "misread_inputs",
    "quantized_loading",
    "unquantized_modules",
]


def blocks_path(model: Any, path: str | None) -> str | None:
    """Where a block stack that the user named in the bare model is in ``model``, which PEFT may have wrapped."""
    if path is None or not hasattr(model, "get_base_model"):
        return path
    return "+".join(f"base_model.model.{single}" for single in path.split("+"))


def check_mergeable(model: Any) -> None:
    """Raise a ConfigError if adapters cannot be merged into ``model``: see `peft_based.check_mergeable`."""
    from progtuning_ds.methods import peft_based

    peft_based.check_mergeable(model)


def apply_method(model: PreTrainedModel, method: Method, *, blocks_path: str | None = None) -> Any:
    """Make ``model`` train what ``method`` trains.

    Args:
        model: a bare model, on any device (meta included).
        method: what to train.
        blocks_path: as in `discover_blocks`, for methods that look at blocks.

    Returns:
        The model: wrapped by PEFT for PEFT's methods, else itself, changed in place.

    Raises:
        ConfigError: if the method finds nothing to train in it.
    """
    if method.kind == "full":
        return model
    if method.uses_peft:
        from progtuning_ds.methods.peft_based import add_peft

        return add_peft(model, method, blocks_path=blocks_path)
    if method.kind == "adapter":
        config = BottleneckConfig(method.placement, method.reduction, targets=method.targets)
        model.bottleneck_config = add_bottlenecks(  # type: ignore[assignment]
            model, config, blocks_path=blocks_path, train_head=method.train_head
        )
        return model
    from progtuning_ds.methods.selective import biases, norms

    names = biases(model) if method.kind == "bitfit" else norms(model)
    in_blocks = {name for block in discover_blocks(model, path=blocks_path).blocks for name in block}
    heads = head_modules(model)
    of_heads = {name for name, _ in model.named_parameters() if name.split(".", 1)[0] in heads}
    if in_blocks.isdisjoint(names):
        what = "biases" if method.kind == "bitfit" else "normalization layers"
        raise ConfigError(
            f"method.kind {method.kind} finds nothing to train: blocks of {model.config.model_type} have no {what}"
        )
    set_trainable(model, of_heads.union(names) if method.train_head else set(names) - of_heads)
    return model
