"""LoRA, DoRA, rsLoRA and IA3, by PEFT. May import torch, transformers and peft; no deepspeed."""

from __future__ import annotations

from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.methods.heads import head_modules
from progtuning_ds.methods.settings import Method

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def add_peft(model: PreTrainedModel, method: Method) -> PeftModel:
    """Wrap ``model`` so that only what PEFT adds, and the task's head, requires grad.

    Raises:
        ConfigError: if PEFT knows no usual targets for the architecture, or none of ``method.targets`` is there.
    """
    config = peft_config(model, method)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        message = " ".join(str(error).split())
        if method.targets:
            names = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
            near = did_you_mean(method.targets[0], names)
            raise ConfigError(f"method.targets {list(method.targets)} fit no module{near}: {message}") from error
        raise ConfigError(
            f"method.targets must be given for {model.config.model_type} with method.kind {method.kind}: {message}"
        ) from error


def peft_config(model: PreTrainedModel, method: Method) -> PeftConfig:
    """The configuration PEFT saves beside the adapters."""
    task = next((task for end, task in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None)
    shared: dict[str, Any] = {
        "task_type": task,
        "modules_to_save": head_modules(model) or None if method.train_head else None,
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
    return "all-linear" if method.targets == ("all-linear",) else list(method.targets)
