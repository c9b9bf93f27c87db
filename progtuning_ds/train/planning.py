"""Turns the schedule section into a stage plan, and checks what freezing does. No torch, no deepspeed."""

from __future__ import annotations

from dataclasses import replace

from progtuning_ds.config import RunConfig, ScheduleConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import EngineSetup, Workload
from progtuning_ds.schedule import StagePlan, custom_plan, plan_stages


def make_plan(schedule: ScheduleConfig, num_blocks: int, *, epochs: int, steps_per_epoch: int) -> StagePlan:
    """Plan the stages of a run.

    Args:
        schedule: the section of the run configuration.
        num_blocks: Transformer blocks of the model.
        epochs: passes over the data; also the number of stages where none is given.
        steps_per_epoch: optimizer steps per epoch.

    Raises:
        ConfigError: if there are more stages than blocks, or the stages do not add up to the run.
    """
    total = epochs * steps_per_epoch
    try:
        if not schedule.enabled:
            return plan_stages(num_blocks, 1, total)
        if schedule.stages is not None:
            return _custom(schedule, num_blocks, total)
        lengths = schedule.stage_lengths
        return plan_stages(
            num_blocks,
            schedule.num_stages or (len(lengths) if lengths else epochs),
            total,
            schedule.embeddings,
            lengths=lengths,
            length_unit=schedule.length_unit,
            steps_per_epoch=steps_per_epoch,
            always_train=schedule.always_train,
        )
    except ConfigError as error:
        unset = schedule.enabled and schedule.num_stages is None and not (schedule.stages or schedule.stage_lengths)
        hint = " (schedule.num_stages is not set, so there is one per epoch)" if unset else ""
        raise ConfigError(f"schedule: {error}{hint}") from error


def _custom(schedule: ScheduleConfig, num_blocks: int, total: int) -> StagePlan:
    plan = custom_plan(num_blocks, schedule.stages or [], always_train=schedule.always_train)
    if plan.total_steps != total:
        raise ConfigError(f"the steps of stages must add up to the {total} steps of the run, got {plan.total_steps}")
    return plan


def check_on_freeze(config: RunConfig, load: Workload, setup: EngineSetup) -> None:
    """Raise a ConfigError, one line, unless `schedule.on_freeze` and `export.frozen` fit the run.

    Args:
        config: the run configuration.
        load: its model and stages.
        setup: its engine.
    """
    kind = config.schedule.on_freeze
    if kind == "keep":
        if config.export.frozen != "dequantized":
            raise ConfigError(
                f"export.frozen {config.export.frozen} needs schedule.on_freeze int8 or nf4; without, every export "
                f"holds exact weights"
            )
        return
    if config.method.kind != "full":
        raise ConfigError(
            f"schedule.on_freeze must be keep with method.kind {config.method.kind}, got {kind!r}: nothing of the "
            f"base trains before it freezes; method.quantization quantizes it from the start"
        )
    reason = load.why_not_quantized(replace(setup, on_freeze=kind))
    if reason:
        raise ConfigError(f"schedule.on_freeze must be keep here, got {kind!r}: {reason}")
