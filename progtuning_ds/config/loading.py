"""Loads, overrides, checks and saves a run configuration. No torch, no deepspeed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from progtuning_ds.config import files, problems
from progtuning_ds.config.schema import DataConfig, MemoryConfig, MethodConfig, RunConfig, TrainConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import parse_bytes

_ADAPTER = TypeAdapter(RunConfig)


def load_run_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a YAML or JSON file (or a shipped configuration by name) and apply `section.field=value` to it.

    Raises:
        ConfigError: one line per mistake, each with the field, the value and what is allowed.
    """
    settings = files.read_mapping(files.config_path(str(path)), "--config")
    for override in overrides:
        apply_override(settings, override)
    return run_config(settings)


def run_config(settings: Mapping[str, Any]) -> RunConfig:
    """Check a mapping of sections and return the configuration; see `load_run_config` for the errors."""
    # An empty section (`train:` with every line commented out) is read as None, and means the defaults.
    given = {key: value for key, value in settings.items() if not (value is None and key in _SECTIONS)}
    task = given.get("task")
    if isinstance(task, Mapping) and "kind" not in task:
        given["task"] = {"kind": "classification", **task}
    try:
        config = _ADAPTER.validate_python(given)
    except ValidationError as error:
        raise ConfigError("\n".join(problems.lines(error, RunConfig))) from error
    _check_data(config.data)
    _check_train(config.train)
    _check_method(config.method)
    _check_memory(config.memory)
    return config


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in nested mappings; the value is read as YAML.

    Raises:
        ConfigError: if it is not of that form, or goes below something that is no mapping.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"an override must look like train.epochs=2, got {override!r}")
    try:
        value = files.parse_value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} must be a YAML value, got {text!r}") from error
    node = settings
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not problems.is_mapping(child):
            raise ConfigError(f"{name} cannot be set: {'.'.join(keys[:depth])} is {child!r}, not a mapping")
        node = child
    node[keys[-1]] = value


def save_run_config(config: RunConfig, path: Path) -> None:
    """Write the configuration as YAML that loads to an equal one."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=100)
    path.write_text(text, encoding="utf-8")


_SECTIONS = tuple(field.name for field in dataclasses.fields(RunConfig) if problems.is_section(RunConfig, field.name))


def _check_data(data: DataConfig) -> None:
    if data.source and data.train_file:
        raise ConfigError(
            f"data.source is {data.source!r} and data.train_file is {data.train_file!r}; give one of them"
        )
    if not data.train_file and (data.validation_file or data.test_file):
        name = "validation_file" if data.validation_file else "test_file"
        raise ConfigError(f"data.{name} is {getattr(data, name)!r} but data.train_file is not set")
    held_out = data.validation_file or data.validation_split
    if data.validation_fraction and held_out:
        name = "validation_file" if data.validation_file else "validation_split"
        raise ConfigError(
            f"data.validation_fraction is {data.validation_fraction} and data.{name} is {held_out!r}; give one of them"
        )


def _check_method(method: MethodConfig) -> None:
    mergeable = ("lora", "dora", "rslora", "ia3")
    if method.merge and method.kind not in mergeable:
        raise ConfigError(f"method.merge needs method.kind {', '.join(mergeable)}, got {method.kind}")


def _check_train(train: TrainConfig) -> None:
    if train.warmup_steps is not None and train.warmup_ratio is not None:
        raise ConfigError(
            f"train.warmup_steps is {train.warmup_steps} and train.warmup_ratio is {train.warmup_ratio}; "
            "give one of them"
        )


def _check_memory(memory: MemoryConfig) -> None:
    budget = None if memory.budget is None else parse_bytes("memory.budget", memory.budget)
    reserve = parse_bytes("memory.reserve", memory.reserve) if memory.reserve else 0
    if budget is not None and reserve >= budget:
        raise ConfigError(f"memory.reserve must be below memory.budget {memory.budget!r}, got {memory.reserve!r}")
    if memory.reinvest != "none" and budget is None:
        raise ConfigError(f"memory.reinvest is {memory.reinvest} but memory.budget is not set; give one, such as 24GB")
    if memory.reinvest == "micro_batch" and memory.micro_batch_sizes is not None:
        raise ConfigError(
            f"memory.reinvest is micro_batch and memory.micro_batch_sizes is {memory.micro_batch_sizes}; "
            "give one of them"
        )
    if memory.reinvest == "unoffload" and memory.host_state == "none":
        raise ConfigError(
            "memory.reinvest is unoffload but memory.host_state is none; set it to lowest_part or all, "
            "which is what moves back"
        )
