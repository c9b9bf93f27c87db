"""Turns the schedule section into a stage plan. No torch, no deepspeed."""

from __future__ import annotations

from progtuning_ds.config import ScheduleConfig
from progtuning_ds.errors import ConfigError
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
