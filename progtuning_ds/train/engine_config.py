"""Lets DeepSpeed check its own configuration before a model is loaded. Uses deepspeed's public API only."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import deepspeed
import torch
from pydantic import ValidationError

from progtuning_ds.errors import ConfigError, did_you_mean

# Beside the classes of torch.optim and torch.optim.lr_scheduler, which DeepSpeed takes by their names.
_OPTIMIZERS = ("Adam", "AdamW", "Lamb", "Lion", "Muon", "OneBitAdam", "OneBitLamb", "ZeroOneAdam")
_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")

# Sections that need a package which DeepSpeed does not bring, and would ask for when the model is loaded.
_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def check_engine_config(content: dict[str, Any], name: str) -> None:
    """Raise a ConfigError in one line if DeepSpeed would refuse a configuration; needs the process group.

    Args:
        content: the complete configuration.
        name: where it comes from, for the message.
    """
    _check_type("optimizer", content, _OPTIMIZERS, torch.optim, name)
    _check_type("scheduler", content, _SCHEDULERS, torch.optim.lr_scheduler, name)
    for section, package in _MONITORS.items():
        given = content.get(section)
        if isinstance(given, dict) and given.get("enabled") and find_spec(package) is None:
            raise ConfigError(f"{section}.enabled in {name} needs a package that is not here: pip install {package}")
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(content))
    except ValidationError as error:
        mistakes = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}" for one in error.errors()
        )
        raise ConfigError(f"deepspeed: {error.title} refuses {name}: {mistakes}") from error
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"deepspeed: DeepSpeed refuses {name}: {reason}") from error


def _check_type(section: str, content: dict[str, Any], own: tuple[str, ...], module: Any, name: str) -> None:
    wanted = content.get(section, {}).get("type")
    if wanted is None or hasattr(module, wanted) or wanted.lower() in {known.lower() for known in own}:
        return
    raise ConfigError(
        f"{section}.type must be one of {', '.join(own)} or a class of {module.__name__}, got {wanted!r} in {name}"
        f"{did_you_mean(wanted, own)}"
    )
