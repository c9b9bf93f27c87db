"""Projects a run on the JSON that DeepSpeed gets: every "auto" filled, every count consistent. No torch, no deepspeed.

Which keys know "auto", and what they become, follows Hugging Face's Trainer (transformers/integrations/deepspeed.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from progtuning_ds.config.schema import RunConfig
from progtuning_ds.config.settings import Settings
from progtuning_ds.config.source import DeepSpeedSource
from progtuning_ds.errors import ConfigError


def project(
    config: RunConfig,
    source: DeepSpeedSource,
    settings: Settings,
    *,
    total_steps: int,
    warmup_steps: int,
    hidden_size: int | None,
) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    Args:
        config: the run configuration.
        source: the DeepSpeed JSON as given.
        settings: what `settle` made of the two.
        total_steps: optimizer steps of the run.
        warmup_steps: of these, steps of warm-up.
        hidden_size: width of the model, from which bucket sizes are derived.

    Raises:
        ConfigError: if the scheduler's length is not the run's, or an "auto" is left that nobody can fill.
    """
    content = copy.deepcopy(source.content)
    content["train_batch_size"] = settings.global_batch_size
    content["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
    content["gradient_accumulation_steps"] = settings.gradient_accumulation_steps
    content["gradient_clipping"] = settings.max_grad_norm
    for name in ("bf16", "fp16"):
        if name in content or name == settings.precision:
            content.setdefault(name, {})["enabled"] = name == settings.precision
    content.setdefault("steps_per_print", 10**9)
    _fill_optimizer(content, config, source, settings)
    _fill_scheduler(content, config, source, settings, total_steps, warmup_steps)
    _fill_buckets(content, hidden_size)
    left = list(_autos(content))
    if left:
        raise ConfigError(f"{', '.join(left)} cannot be auto in {source.name}: write a value")
    return content


def _fill_optimizer(content: dict[str, Any], config: RunConfig, source: DeepSpeedSource, settings: Settings) -> None:
    if "optimizer" not in content:
        wanted: dict[str, Any] = dict.fromkeys(_OPTIMIZER_KEYS, "auto")
        if not source.offloads_optimizer:
            # PyTorch's AdamW needs no compiler on the node; offload insists on DeepSpeed's own CPU Adam.
            wanted |= {"torch_adam": True, "fused": True}
        content["optimizer"] = {"type": "AdamW", "params": wanted}
    params = content["optimizer"].setdefault("params", {})
    train = config.train
    values = {
        "lr": (settings.learning_rate, True),
        "betas": (list(settings.betas), (train.adam_beta1, train.adam_beta2) != (None, None)),
        "eps": (settings.epsilon, train.adam_epsilon is not None),
        "weight_decay": (settings.weight_decay, train.weight_decay is not None),
    }
    for key, (value, asked_for) in values.items():
        # What nobody asked for is not added: an optimizer other than Adam may not know it.
        if params.get(key) == "auto" or (asked_for and key not in params):
            params[key] = value


_OPTIMIZER_KEYS = ("lr", "betas", "eps", "weight_decay")


def _fill_scheduler(
    content: dict[str, Any],
    config: RunConfig,
    source: DeepSpeedSource,
    settings: Settings,
    total_steps: int,
    warmup_steps: int,
) -> None:
    if settings.lr_scheduler_type is not None:
        content.pop("scheduler", None)  # the run brings transformers' scheduler
        return
    key = "scheduler.params.total_num_steps"
    stated = source.number(key)
    if stated is not None and stated != total_steps:
        raise ConfigError(
            f"{key} is {stated} in {source.name} but the run has {total_steps} steps "
            f"(train.epochs {config.train.epochs} x {total_steps // config.train.epochs}); "
            f"make it {total_steps} or auto"
        )
    params = content["scheduler"].setdefault("params", {})
    values = {
        "warmup_min_lr": 0,
        "warmup_max_lr": settings.learning_rate,
        "warmup_num_steps": max(1, warmup_steps),  # DeepSpeed knows no schedule without warm-up
        "total_num_steps": total_steps,
    }
    for name, value in values.items():
        if params.get(name) == "auto":
            params[name] = value


def _fill_buckets(content: dict[str, Any], hidden_size: int | None) -> None:
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict) or hidden_size is None:
        return
    values = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for name, value in values.items():
        if zero.get(name) == "auto":
            zero[name] = value


def _autos(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _autos(value, f"{prefix}.{key}" if prefix else str(key))
    elif node == "auto":
        yield prefix
