"""The DeepSpeed JSON as the user gave it: a preset, a file, or a section of the run config. No torch, no deepspeed."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progtuning_ds.config.files import SUFFIXES, read_mapping
from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.presets import preset_names, preset_path


@dataclass(frozen=True, slots=True)
class DeepSpeedSource:
    """A DeepSpeed configuration that may still hold `"auto"`, and what to call it in a message."""

    content: dict[str, Any]
    name: str
    is_preset: bool = False

    def get(self, key: str) -> Any:
        """Return the value under a dotted key, or None."""
        node: Any = self.content
        for part in key.split("."):
            if not isinstance(node, dict):
                return None
            node = node.get(part)
        return node

    def number(self, key: str) -> int | float | None:
        """Return the number under a dotted key, or None where it is absent or `"auto"`.

        Raises:
            ConfigError: if it is something else.
        """
        value = self.get(key)
        if value is None or value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{key} must be a number or auto, got {value!r} in {self.name}")
        return value

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 where none is given."""
        return int(self.number("zero_optimization.stage") or 0)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer state lives outside the accelerator."""
        return self.get("zero_optimization.offload_optimizer.device") not in (None, "none")


def load_deepspeed(setting: str | dict[str, Any]) -> DeepSpeedSource:
    """Resolve the `deepspeed` setting.

    Raises:
        ConfigError: if it is neither a preset nor a readable file; the message names the nearest preset or file.
    """
    if isinstance(setting, dict):
        return _checked(copy.deepcopy(setting), "the section deepspeed")
    if setting in preset_names():
        path = preset_path(setting)
        return _checked(read_mapping(path, "deepspeed"), f"preset {setting}", is_preset=True)
    path = Path(setting).expanduser()
    if path.suffix in SUFFIXES or path.is_file():
        return _checked(read_mapping(path, "deepspeed"), str(path))
    names = preset_names()
    raise ConfigError(
        f"deepspeed must be a JSON file or one of {', '.join(names)}, got {setting!r}{did_you_mean(setting, names)}"
    )


def _checked(content: dict[str, Any], name: str, *, is_preset: bool = False) -> DeepSpeedSource:
    """Refuse misspelt keys, and bring what has an old name under the new one."""
    for key in content:
        near = difflib.get_close_matches(key, _SECTIONS, n=1, cutoff=0.85)
        if near and key not in _SECTIONS:
            raise ConfigError(f"deepspeed: {key} is not a key that DeepSpeed reads; did you mean {near[0]!r}? ({name})")
    if "bfloat16" in content and "bf16" not in content:
        content["bf16"] = content.pop("bfloat16")
    for key in _MAPPINGS:
        if not isinstance(content.get(key, {}), dict):
            raise ConfigError(f"deepspeed: {key} must be a mapping, got {content[key]!r} in {name}")
    return DeepSpeedSource(content, name, is_preset)


# DeepSpeed ignores a key that it does not know. A key that is nearly one of these is taken for a mistake; others pass,
# because newer versions may know them.
_SECTIONS = (
    "activation_checkpointing",
    "amp",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "disable_allgather",
    "dump_state",
    "elasticity",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "memory_breakdown",
    "optimizer",
    "prescale_gradients",
    "scheduler",
    "sparse_gradients",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
_MAPPINGS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16")
