"""Finds and loads the pretrained model, its tokenizer and its shape. Imports transformers; no deepspeed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from progtuning_ds.config import MethodConfig, ModelConfig
from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.methods import (
    Method,
    apply_method,
    head_modules,
    keep_trainable,
    quantized_loading,
    unquantized_modules,
)
from progtuning_ds.train.acceleration import use_liger

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def model_path(model: ModelConfig) -> str:
    """Return where the model is: the folder of the embedded default, or what the user gave."""
    if model.path != "demo":
        return model.path
    # Imported here so that other models need nothing of the embedded default.
    from progtuning_ds.assets import demo_model_dir

    return str(demo_model_dir())


def load_shape(model: ModelConfig) -> PreTrainedConfig:
    """Load the model's configuration, without weights.

    Raises:
        ConfigError: if there is no such model; the message names the nearest folder.
    """
    path = model_path(model)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: cannot load {path!r}: {_first_line(error)}{_near_folder(path)}") from error


def load_tokenizer(model: ModelConfig, shape: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer and make sure that it can pad, on the model's side too.

    Raises:
        ConfigError: if there is no tokenizer, or no token to pad with.
    """
    path = model_path(model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: no tokenizer in {path!r}: {_first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers makes of a folder that has none.
        raise ConfigError(f"model.path: no tokenizer in {path!r}: it knows no word")
    if tokenizer.pad_token is None:
        # Decoders are trained without padding; what is padded is masked, so any known token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"model.path: the tokenizer of {path!r} has no token to pad with (no pad, eos or unk token)")
    if getattr(shape, "pad_token_id", None) is None:
        shape.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def method_of(config: MethodConfig) -> Method:
    """Return the method that a section of the run configuration describes."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Method)}
    return Method(**fields)


def empty_model(
    auto_class: Any, model: ModelConfig, shape: PreTrainedConfig, method: Method | None = None
) -> PreTrainedModel:
    """Build the model on the meta device: names and shapes without memory.

    Raises:
        ConfigError: if there is no such model with this head or attention, or the method does not fit it.
    """
    attention = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    try:
        with torch.device("meta"):
            empty = auto_class.from_config(shape, **attention)
            return apply_method(empty, method, blocks_path=model.blocks) if method else empty
    except ConfigError:
        raise
    except (ValueError, ImportError) as error:
        raise ConfigError(f"model: cannot build {shape.model_type}: {_first_line(error)}") from error


def load_model(
    auto_class: Any, model: ModelConfig, shape: PreTrainedConfig, precision: str, method: Method | None = None
) -> PreTrainedModel:
    """Load the weights. Under ZeRO-3, with an `HfDeepSpeedConfig` alive, they are partitioned as they are read.

    Args:
        auto_class: Auto class of transformers, which chooses the head.
        model: the section of the run configuration.
        shape: the model's configuration, with what the task sets.
        precision: `fp32`, `bf16` or `fp16`.
        method: what trains; all of it by default.

    Raises:
        ConfigError: if the method leaves a head alone that the model's files do not have.
    """
    attention = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    loaded, info = auto_class.from_pretrained(
        model_path(model),
        output_loading_info=True,
        config=shape,
        dtype=DTYPES[precision],
        # A head for other classes, as of a model tuned on another task, is replaced by a new one.
        ignore_mismatched_sizes=True,
        **attention,
        **_quantization(auto_class, model, shape, precision, method),
    )
    if method is not None and method.adds_parameters and not method.train_head:
        _check_head(loaded, info, model)
    if model.liger:
        use_liger(loaded)
    keep_trainable(loaded)
    if method is not None:
        loaded = apply_method(loaded, method, blocks_path=model.blocks)
    if model.gradient_checkpointing:
        # Reentrant checkpointing would need inputs that require grad, which frozen embeddings do not give.
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loaded.config.use_cache = False
    return loaded


def _check_head(loaded: PreTrainedModel, info: dict[str, Any], model: ModelConfig) -> None:
    """A head that was drawn just now, does not train and is not saved could never be had again."""
    drawn = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    heads = set(head_modules(loaded)) & {name.split(".", 1)[0] for name in drawn}
    if heads:
        raise ConfigError(
            f"method.train_head must be true with model.path {model.path!r}: it has no weights for {min(heads)!r}, "
            f"and random ones would be saved nowhere"
        )


def _quantization(
    auto_class: Any, model: ModelConfig, shape: PreTrainedConfig, precision: str, method: Method | None
) -> dict[str, Any]:
    return quantized_loading(method, DTYPES[precision], kept_exact(auto_class, model, shape, method))


def kept_exact(auto_class: Any, model: ModelConfig, shape: PreTrainedConfig, method: Method | None) -> list[str]:
    """Modules of the bare model that ``method`` does not quantize; none where it quantizes nothing."""
    if method is None or method.quantization == "none":
        return []
    return unquantized_modules(empty_model(auto_class, model, shape))


def max_positions(model: ModelConfig, shape: PreTrainedConfig) -> int | None:
    """Return the longest sequence the model can read in tokens, or None where its configuration sets no limit."""
    limit = getattr(shape.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    for module in empty_model(AutoModel, model, shape).modules():
        # RoBERTa and its like number positions from behind the padding index.
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.num_embeddings == limit:
            return limit - module.padding_idx - 1
    return limit


def hidden_size(shape: PreTrainedConfig) -> int | None:
    """Return the model's width; the largest where it has several."""
    text = shape.get_text_config()
    several = getattr(text, "hidden_sizes", None)
    return getattr(text, "hidden_size", None) or (max(several) if several else None)


def _near_folder(path: str) -> str:
    folder = Path(path)
    if folder.exists() or not folder.parent.is_dir():
        return ""
    return did_you_mean(folder.name, (entry.name for entry in folder.parent.iterdir() if entry.is_dir()))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()
