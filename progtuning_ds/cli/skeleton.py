"""Owns building a model without weights from its config.json. May import torch and transformers; no deepspeed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

from progtuning_ds.errors import ConfigError, did_you_mean, require_choice

# head: (auto class, its mapping from configs, ending of the architectures that have it)
_HEADS = {
    "sequence-classification": (
        transformers.AutoModelForSequenceClassification,
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "ForSequenceClassification",
    ),
    "question-answering": (
        transformers.AutoModelForQuestionAnswering,
        transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        "ForQuestionAnswering",
    ),
    "token-classification": (
        transformers.AutoModelForTokenClassification,
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "ForTokenClassification",
    ),
    "causal-lm": (
        transformers.AutoModelForCausalLM,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        ("ForCausalLM", "LMHeadModel"),
    ),
    # Encoders are published with this head and seldom fine-tuned with it: asked for only, never guessed.
    "masked-lm": (transformers.AutoModelForMaskedLM, transformers.MODEL_FOR_MASKED_LM_MAPPING, ()),
    "seq2seq-lm": (
        transformers.AutoModelForSeq2SeqLM,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "ForConditionalGeneration",
    ),
    "image-classification": (
        transformers.AutoModelForImageClassification,
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "ForImageClassification",
    ),
}
HEADS = tuple(_HEADS)
_HEADS_WITH_LABELS = ("sequence-classification", "token-classification", "image-classification")


def load_config(model: str) -> transformers.PretrainedConfig:
    """Read the config of a folder, a JSON file or a hub id; `ConfigError` when there is none to read."""
    path = _local_file(model)
    try:
        return transformers.AutoConfig.from_pretrained(model if path is None else str(path))
    except OSError as error:
        raise ConfigError(
            f"model must be a folder or file with a config.json, or a hub id that can be reached, got {model!r}"
        ) from error
    except Exception as error:  # transformers raises many kinds; the file is at fault
        raise ConfigError(f"model {model!r} has a config that transformers refuses: {_one_line(error)}") from error


def _local_file(model: str) -> Path | None:
    """Return the checked config file that `model` names, or `None` when it can only be a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model must be a folder with a config.json, got {model!r}, which has none")
        path = path / "config.json"
    if path.is_file():
        _check_file(path)
        return path
    if model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1:
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        raise ConfigError(
            f"model must be a folder or file with a config.json, or a hub id, got {model!r}, which does not exist"
            f"{did_you_mean(path.name, siblings)}"
        )
    return None


def choose_head(config: transformers.PretrainedConfig, asked: str | None = None) -> str:
    """Return the head to count: the one asked for, else the architecture's, else sequence classification."""
    if asked is not None:
        require_choice("head", asked, HEADS)
    available = [head for head, (_, mapping, _) in _HEADS.items() if type(config) in mapping]
    if not available or (asked is not None and asked not in available):
        raise ConfigError(
            f"head must be one that {config.model_type} models have ({', '.join(available) or 'none'}), "
            f"got {asked or 'no choice'}"
        )
    if asked is not None:
        return asked
    for architecture in config.architectures or ():
        for head in available:
            if architecture.endswith(_HEADS[head][2]):
                return head
    return available[0]


def build_skeleton(config: transformers.PretrainedConfig, head: str, num_labels: int | None = None) -> nn.Module:
    """Build the model with `head` on the meta device: every shape, no weights, no memory.

    Raises:
        ConfigError: if the config does not describe a model that can be built, or the head has no labels to set.
    """
    if num_labels is not None:
        if head not in _HEADS_WITH_LABELS:
            raise ConfigError(f"num_labels is for {', '.join(_HEADS_WITH_LABELS)}, got {num_labels} with {head}")
        if num_labels < 1:
            raise ConfigError(f"num_labels must be a positive whole number, got {num_labels}")
        config.num_labels = num_labels
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Attention kernels are not needed to count, and those of the config may not be installed.
            return _HEADS[head][0].from_config(config, attn_implementation="eager")
    except Exception as error:  # constructors raise many kinds; the config is at fault
        raise ConfigError(f"model cannot be built from its {config.model_type} config: {_one_line(error)}") from error


def _check_file(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model must have a config.json in JSON, got {str(path)!r}: {_one_line(error)}") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"model_type in {str(path)!r} must be one that transformers {transformers.__version__} knows, got {kind!r}"
            f"{did_you_mean(kind, transformers.CONFIG_MAPPING)}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
