"""LoRA, DoRA, rsLoRA and IA3, by PEFT. May import torch, transformers and peft; no deepspeed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from transformers import PreTrainedModel

from progtuning_ds.errors import ConfigError
from progtuning_ds.methods.heads import head_modules
from progtuning_ds.methods.layers import check_targets, ends_of, linear_layers, queries_and_values, users_of
from progtuning_ds.methods.settings import ALL_LINEAR, Method

# By whether the method is IA3.
_USUAL_TARGETS = (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep PEFT from warning of what is between it and transformers."""
    with warnings.catch_warnings():
        # It asks transformers for a property by the name that it is about to lose.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        # It then sets what it asks for, as GPT-2's Conv1D wants it.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def add_peft(model: PreTrainedModel, method: Method, *, blocks_path: str | None = None) -> PeftModel:
    """Wrap ``model`` so that only what PEFT adds, and the task's head, requires grad.

    Args:
        model: a bare model.
        method: one of PEFT's.
        blocks_path: as in `discover_blocks`; where PEFT does not know the architecture, targets are looked for there.

    Raises:
        ConfigError: if no usual targets are known for the architecture, or none of ``method.targets`` is there.
    """
    if not (method.targets or _USUAL_TARGETS[method.kind == "ia3"].get(model.config.model_type)):
        method = replace(method, targets=_own_targets(model, method, blocks_path))
    check_targets(model, method.targets)
    try:
        with quiet_peft():
            return get_peft_model(model, peft_config(model, method))
    except ValueError as error:
        message = " ".join(str(error).split())
        if not method.targets:
            family = f"{model.config.model_type} with method.kind {method.kind}"
            raise ConfigError(f"method.targets must be given for {family}: {message}") from error
        raise ConfigError(f"method.targets {list(method.targets)} cannot be adapted: {message}") from error


def _own_targets(model: PreTrainedModel, method: Method, blocks_path: str | None) -> tuple[str, ...]:
    """Queries and values, as PEFT has them for most architectures that it knows."""
    blocks = linear_layers(model, blocks_path)
    names = [] if method.kind == "ia3" else queries_and_values(blocks)
    if not names:
        known = ", ".join(ends_of(layer for layers in blocks for layer in layers))
        raise ConfigError(
            f"method.targets must be given for {model.config.model_type} with method.kind {method.kind}: "
            f"no usual ones are known; its blocks have {known}"
        )
    return tuple(names)


def check_mergeable(model: PeftModel) -> None:
    """Raise a ConfigError if a layer to merge into shares its weight with another, which merging would change too."""
    users = users_of(model)
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            others = [user for user in users[id(module.get_base_layer().weight)] if not user.startswith(path)]
            if others:
                raise ConfigError(
                    f"method.merge must be false where {path.rpartition('.')[2]} is adapted, got true: its weight is "
                    f"tied to {others[0]!r}, which merging would change too"
                )


def peft_config(model: PreTrainedModel, method: Method) -> PeftConfig:
    """The configuration PEFT saves beside the adapters."""
    heads = head_modules(model)
    # With a task that has a head, PEFT trains the head whatever it is told.
    known = [task for end, task in _TASK_TYPES.items() if type(model).__name__.endswith(end)]
    shared: dict[str, Any] = {
        "task_type": known[0] if known and (method.train_head or not heads) else None,
        "modules_to_save": heads or None if method.train_head else None,
    }
    targets = _targets(method)
    if method.kind == "ia3":
        return IA3Config(target_modules=targets, feedforward_modules=[] if targets else None, **shared)
    scale: Any = method.alpha  # PEFT says int, and computes with any number
    return LoraConfig(
        lora_alpha=scale,
        r=method.rank,
        lora_dropout=method.dropout,
        target_modules=targets,
        use_dora=method.kind == "dora",
        use_rslora=method.kind == "rslora",
        **shared,
    )


def _targets(method: Method) -> list[str] | str | None:
    if not method.targets:
        return None
    return ALL_LINEAR if method.targets == (ALL_LINEAR,) else list(method.targets)
