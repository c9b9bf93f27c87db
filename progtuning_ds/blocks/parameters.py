"""Owns reading sizes of parameters and setting requires_grad. May import torch; no deepspeed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel

from progtuning_ds.accounting import ComponentCounts
from progtuning_ds.blocks.block_map import BlockMap
from progtuning_ds.errors import ConfigError, did_you_mean


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the parameter's shape; ZeRO-3 keeps it in `ds_shape` while the tensor itself is empty.

    A weight that was quantized when its block froze keeps the one it had in `dense_shape`.
    """
    return tuple(getattr(parameter, "dense_shape", None) or getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: torch.Tensor) -> int:
    """Return the parameter's number of elements, also when ZeRO-3 has partitioned it."""
    return prod(full_shape(parameter))


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Make exactly the parameters in `names` require grad; the only place of the project that does.

    Args:
        model: the bare module, not a DeepSpeed engine.
        names: canonical names, as in `model.named_parameters()`.

    Raises:
        ConfigError: if a name is no parameter of the model. Nothing has changed then.
    """
    parameters = dict(model.named_parameters())
    wanted = set(names)
    for name in sorted(wanted - parameters.keys()):
        raise ConfigError(f"names must be parameters of the model, got {name!r}{did_you_mean(name, parameters)}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)


def let_backward_stop(model: nn.Module) -> None:
    """Take away what makes the outputs of frozen embeddings require grad, so that backward can stop above them.

    With gradient checkpointing, transformers (`PreTrainedModel.enable_input_require_grads`) makes the embeddings'
    output require grad, which runs backward through every frozen block. Only reentrant checkpointing needs that.

    Args:
        model: the bare module; nothing happens when it does no checkpointing.

    Raises:
        ConfigError: if the model uses reentrant checkpointing, whose lowest trainable block would get no gradient.
    """
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if keywords.get("use_reentrant", False):
                raise ConfigError(
                    f"gradient checkpointing must be non-reentrant when embeddings freeze, got use_reentrant=True in "
                    f"{name or 'the model'}; enable it with {{'use_reentrant': False}}"
                )
    for module in model.modules():
        # Older transformers fail to disable what was never enabled.
        if isinstance(module, PreTrainedModel) and hasattr(module, "_require_grads_hook"):
            module.disable_input_require_grads()


def component_counts(model: nn.Module, blocks: BlockMap, *, always_train: Collection[str] = ()) -> ComponentCounts:
    """Count the parameters that may train: those that required grad at discovery, tied weights once.

    Args:
        model: the model that `blocks` was found in; may be on the meta device or partitioned by ZeRO-3.
        blocks: what `discover_blocks` returned.
        always_train: fnmatch patterns as in `StagePlan.always_train`.

    Raises:
        ConfigError: if a pattern matches nothing.
    """
    sizes = {name: full_numel(p) for name, p in model.named_parameters() if name not in blocks.frozen}
    always = blocks.always_names(tuple(always_train))

    def count(names: Iterable[str], only: Collection[str] = sizes.keys()) -> int:
        return sum(sizes[name] for name in names if name in sizes and name in only)

    return ComponentCounts(
        embeddings=count(blocks.embeddings),
        blocks=tuple(count(block) for block in blocks.blocks),
        head=count(blocks.head),
        always_embeddings=count(blocks.embeddings, always),
        always_blocks=tuple(count(block, always) for block in blocks.blocks),
    )


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a state dict holds, without making one: a quantized layer under ZeRO-3 could not."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
