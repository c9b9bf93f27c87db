"""Settles what the run configuration and the DeepSpeed JSON say together. No torch, no deepspeed.

A value may be given on either side. Given on both, it must be the same; given on neither, the default is taken.
Defaults and the meaning of "auto" are those of Hugging Face's Trainer, except for warm-up (a tenth of the run)
and the batch (32 rows over all ranks), so that a result does not depend on how many ranks computed it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from progtuning_ds.config.schema import RunConfig, TrainConfig
from progtuning_ds.config.source import DeepSpeedSource
from progtuning_ds.errors import ConfigError

# Schedulers of DeepSpeed that stand for one of transformers' names.
_SAME_SCHEDULER = {
    "linear": "WarmupDecayLR",
    "constant_with_warmup": "WarmupLR",
    "cosine": "WarmupCosineLR",
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the run is on: number of ranks, kind of device, and the 16-bit types it computes with."""

    world_size: int
    device: str = "cpu"
    bf16: bool = True
    fp16: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers of a run that both sides agree on; batch sizes in rows."""

    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    eval_batch_size: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    precision: str
    lr_scheduler_type: str | None
    """Scheduler of transformers to use, or None for the one in the DeepSpeed JSON."""


@dataclass(frozen=True, slots=True)
class _Given:
    """A value with the name under which the user wrote it."""

    name: str
    value: Any


def settle(config: RunConfig, source: DeepSpeedSource, hardware: Hardware) -> Settings:
    """Return the numbers of the run.

    Raises:
        ConfigError: if the two sides contradict each other, the batch sizes do not divide, or the hardware cannot
            compute in the precision asked for. The message names both fields and values.
    """
    _check_kernel(config, source, hardware)
    train = config.train
    optimizer = "optimizer.params"
    micro, accumulation, rows = _settle_batch(train, source, hardware.world_size)
    beta1, beta2 = _settle_betas(train, source)
    rate = _agree(
        source,
        _Given("train.learning_rate", train.learning_rate),
        _Given(f"{optimizer}.lr", source.number(f"{optimizer}.lr")),
        _Given("scheduler.params.warmup_max_lr", source.number("scheduler.params.warmup_max_lr")),
    )
    decay = _agree(
        source,
        _Given("train.weight_decay", train.weight_decay),
        _Given(f"{optimizer}.weight_decay", source.number(f"{optimizer}.weight_decay")),
    )
    epsilon = _agree(
        source,
        _Given("train.adam_epsilon", train.adam_epsilon),
        _Given(f"{optimizer}.eps", source.number(f"{optimizer}.eps")),
    )
    clip = _agree(
        source,
        _Given("train.max_grad_norm", train.max_grad_norm),
        _Given("gradient_clipping", source.number("gradient_clipping")),
    )
    return Settings(
        world_size=hardware.world_size,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=rows,
        eval_batch_size=train.eval_batch_size or 2 * micro,
        learning_rate=_or(rate, 5e-5),
        weight_decay=_or(decay, 0.01),
        betas=(beta1, beta2),
        epsilon=_or(epsilon, 1e-8),
        max_grad_norm=_or(clip, 1.0),
        precision=_settle_precision(train, source, hardware),
        lr_scheduler_type=_settle_scheduler(train, source),
    )


def settle_warmup(train: TrainConfig, source: DeepSpeedSource, total_steps: int) -> int:
    """Return the steps of linear warm-up of a run of `total_steps`, rounded up from a share as transformers does.

    Raises:
        ConfigError: if the two sides contradict each other, or warm-up is longer than the run.
    """
    wanted: int | None = train.warmup_steps
    name = "train.warmup_steps"
    if train.warmup_ratio is not None:
        name = f"train.warmup_ratio x {total_steps} steps"
        wanted = _share_of(train.warmup_ratio, total_steps)
    key = "scheduler.params.warmup_num_steps"
    steps = _agree(source, _Given(name, wanted), _Given(key, source.number(key)))
    steps = _share_of(0.1, total_steps) if steps is None else int(steps)
    if steps > total_steps:
        raise ConfigError(f"train.warmup_steps must be at most the {total_steps} steps of the run, got {steps}")
    return steps


def _share_of(ratio: float, total_steps: int) -> int:
    """Round up, but not for the sake of a float's last digit (0.1 x 30 is 3)."""
    return -int(-round(ratio * total_steps, 6) // 1)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _agree(source: DeepSpeedSource, *candidates: _Given) -> Any:
    """Return the one value that is given, None where there is none, or tell which two differ."""
    given = [candidate for candidate in candidates if candidate.value is not None]
    for other in given[1:]:
        if other.value != given[0].value:
            raise ConfigError(
                f"{given[0].name} is {given[0].value} but {other.name} is {other.value} in {source.name}; "
                "make them equal or leave one of them out"
            )
    return given[0].value if given else None


def _settle_betas(train: TrainConfig, source: DeepSpeedSource) -> tuple[float, float]:
    betas = source.get("optimizer.params.betas")
    pair = (None, None) if betas in (None, "auto") else tuple(betas)
    if len(pair) != 2:
        raise ConfigError(f"optimizer.params.betas must be two numbers, got {betas!r} in {source.name}")
    key = "optimizer.params.betas"
    beta1 = _agree(source, _Given("train.adam_beta1", train.adam_beta1), _Given(f"{key}[0]", pair[0]))
    beta2 = _agree(source, _Given("train.adam_beta2", train.adam_beta2), _Given(f"{key}[1]", pair[1]))
    return _or(beta1, 0.9), _or(beta2, 0.999)


def _settle_batch(train: TrainConfig, source: DeepSpeedSource, ranks: int) -> tuple[int, int, int]:
    """Return rows per forward pass, passes per step, and rows per step over all ranks."""
    micro, micro_name = _batch_field(source, train, "micro_batch_size", "train_micro_batch_size_per_gpu")
    passes, _ = _batch_field(source, train, "gradient_accumulation_steps", "gradient_accumulation_steps")
    rows, rows_name = _batch_field(source, train, "global_batch_size", "train_batch_size")
    if rows is None:
        rows = micro * passes * ranks if micro and passes else 32
    if micro and passes:
        if micro * passes * ranks != rows:
            raise ConfigError(
                f"{rows_name} must be {micro_name} x gradient_accumulation_steps x ranks = "
                f"{micro} x {passes} x {ranks} = {micro * passes * ranks}, got {rows}"
            )
        return micro, passes, rows
    if micro:
        _check_multiple(rows_name, rows, micro * ranks, f"{micro_name} x ranks = {micro} x {ranks}")
        return micro, rows // (micro * ranks), rows
    passes = passes or 1
    words = f"gradient_accumulation_steps x ranks = {passes} x {ranks}"
    _check_multiple(rows_name, rows, passes * ranks, words)
    return rows // (passes * ranks), passes, rows


def _batch_field(source: DeepSpeedSource, train: TrainConfig, field: str, key: str) -> tuple[int | None, str]:
    wanted = getattr(train, field)
    value = _agree(source, _Given(f"train.{field}", wanted), _Given(key, source.number(key)))
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"{key} must be a positive integer or auto, got {value!r} in {source.name}")
    return value, key if wanted is None and value is not None else f"train.{field}"


def _check_multiple(name: str, rows: int, unit: int, words: str) -> None:
    if rows % unit:
        below = rows // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise ConfigError(f"{name} must be a multiple of {words} = {unit}, got {rows}; nearest: {near}")


def _check_kernel(config: RunConfig, source: DeepSpeedSource, hardware: Hardware) -> None:
    """Say before anything is loaded that there is no fused step for what was asked."""
    kernel = config.optimizer.kernel
    if kernel not in ("triton", "reference"):
        return
    stage = source.number("zero_optimization.stage") or 0
    why = None
    if stage == 0:
        why = f"zero_optimization.stage is 0 in {source.name}, and the fused step is for 1, 2 and 3"
    elif source.offloads_optimizer:
        why = f"{source.name} offloads the optimizer, which the host then updates with DeepSpeedCPUAdam"
    elif kernel == "triton" and hardware.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("optimizer.kernel must be auto, reference or deepspeed on the CPU, got triton")
    if why:
        raise ConfigError(f"optimizer.kernel must be auto or deepspeed here, got {kernel}: {why}")


def _settle_precision(train: TrainConfig, source: DeepSpeedSource, hardware: Hardware) -> str:
    stated = {name: source.get(f"{name}.enabled") for name in ("bf16", "fp16")}
    on = [name for name, value in stated.items() if value is True]
    if len(on) == 2:
        raise ConfigError(f"bf16.enabled and fp16.enabled are both true in {source.name}; choose one")
    precision = train.precision
    if precision == "auto":
        use_bf16 = hardware.device != "cpu" and hardware.bf16 and stated["bf16"] is not False
        precision = on[0] if on else "bf16" if use_bf16 else "fp32"
    for name, value in stated.items():
        if isinstance(value, bool) and value != (name == precision):
            raise ConfigError(
                f"train.precision is {train.precision} but {name}.enabled is {str(value).lower()} in "
                f"{source.name}; make them agree or set {name}.enabled to auto"
            )
    supported = {"bf16": hardware.bf16, "fp16": hardware.fp16, "fp32": True}
    if not supported[precision]:
        choices = ", ".join(name for name, able in supported.items() if able)
        raise ConfigError(f"train.precision on {hardware.device} must be one of {choices}, got {precision}")
    return precision


def _settle_scheduler(train: TrainConfig, source: DeepSpeedSource) -> str | None:
    stated = source.get("scheduler.type")
    wanted = train.lr_scheduler_type
    if stated is None or (source.is_preset and train.changes_rate_at_boundaries):
        return wanted or "linear"
    if train.changes_rate_at_boundaries:
        raise ConfigError(
            f"train.boundary_warmup_steps and stage_lr_factor need a scheduler of train.lr_scheduler_type, but "
            f"scheduler.type is {stated} in {source.name}; remove it there"
        )
    if wanted is None or _SAME_SCHEDULER.get(wanted) == stated:
        return None
    if source.is_preset:  # a preset's scheduler is a default, not a wish
        return wanted
    raise ConfigError(
        f"train.lr_scheduler_type is {wanted} but scheduler.type is {stated} in {source.name}; remove one of them"
    )
