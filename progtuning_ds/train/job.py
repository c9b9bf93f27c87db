"""Everything about a run that is known before any weight is loaded, checked. No deepspeed.

Whatever can be wrong with a configuration, the data or the schedule is found here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from progtuning_ds.accounting import ComponentCounts, RunAccount, account
from progtuning_ds.blocks import BlockMap, component_counts, discover_blocks
from progtuning_ds.config import (
    Hardware,
    RunConfig,
    ScheduleConfig,
    Settings,
    load_deepspeed,
    project,
    settle,
    settle_warmup,
)
from progtuning_ds.memory import Architecture, ParamTable, Workload, setup_from_deepspeed
from progtuning_ds.methods import blocks_path, check_mergeable
from progtuning_ds.model_shape import architecture, param_table
from progtuning_ds.schedule import StagePlan
from progtuning_ds.tasks import Task, build_task
from progtuning_ds.tasks.checksum import rows_checksum
from progtuning_ds.train import models
from progtuning_ds.train.acceleration import check_acceleration
from progtuning_ds.train.order import RowOrder
from progtuning_ds.train.planning import check_on_freeze, make_plan


@dataclass(frozen=True)
class Job:
    """A run, fully described."""

    config: RunConfig
    settings: Settings
    shape: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task
    order: RowOrder
    blocks: BlockMap
    counts: ComponentCounts
    params: ParamTable
    architecture: Architecture | None
    """Of a block, where the model's configuration tells it."""
    plan: StagePlan
    warmup_steps: int
    deepspeed: dict[str, Any]
    """The complete DeepSpeed configuration."""
    deepspeed_name: str
    """Where it came from, for a message."""

    @property
    def kind(self) -> str:
        """What to call the run in a table."""
        method, staged = self.config.method.kind, self.config.schedule.enabled
        if method == "full":
            return "progtuning" if staged else "full fine-tuning"
        return f"progtuning with {method}" if staged else f"{method} without freezing"

    @cached_property
    def workload(self) -> Workload:
        """The run as the model of memory sees it."""
        return Workload(self.params, self.architecture, self.plan)

    @cached_property
    def data_identity(self) -> str:
        """What tells the training rows from others: their number, and a checksum of all they hold."""
        return f"{self.order.num_rows} rows with checksum {rows_checksum(self.task.train.rows)}"

    @property
    def account(self) -> RunAccount:
        """Parameters that the plan updates, by stage and in all."""
        return account(self.counts, self.plan, self.order.steps_per_epoch)

    def until(self, done: int) -> Job:
        """Return the job as if its plan ended after `done` steps, at least one, for what is told of a run."""
        stages = [
            replace(stage, steps=range(stage.steps.start, min(stage.steps.stop, done)))
            for stage in self.plan.stages
            if stage.steps.start < done
        ]
        return replace(self, plan=replace(self.plan, stages=tuple(stages)))

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the run."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))


def prepare_job(config: RunConfig, hardware: Hardware) -> Job:
    """Check a configuration against its data, model and hardware, and work out the run.

    Args:
        config: the run configuration.
        hardware: what the run is on.

    Raises:
        ConfigError: one line on what is wrong.
    """
    source = load_deepspeed(config.deepspeed)
    settings = settle(config, source, hardware)
    shape = models.load_shape(config.model)
    check_acceleration(config, shape, hardware.device, int(source.number("zero_optimization.stage") or 0))
    tokenizer = models.load_tokenizer(config.model, shape)
    task = build_task(config, tokenizer, models.max_positions(config.model, shape))
    shape.update(task.model_settings)
    order = RowOrder(
        num_rows=len(task.train.rows),
        global_batch_size=settings.global_batch_size,
        seed=config.train.seed,
        lengths=task.train.lengths if config.train.group_by_length else None,
    )
    method = models.method_of(config.method)
    empty = models.empty_model(task.auto_class, config.model, shape, method)
    if config.method.merge:
        check_mergeable(empty)
    blocks = discover_blocks(empty, path=blocks_path(empty, config.model.blocks))
    plan = make_plan(config.schedule, len(blocks), epochs=config.train.epochs, steps_per_epoch=order.steps_per_epoch)
    warmup_steps = settle_warmup(config.train, source, plan.total_steps)
    job = Job(
        config=config,
        settings=settings,
        shape=shape,
        tokenizer=tokenizer,
        task=task,
        order=order,
        blocks=blocks,
        counts=component_counts(empty, blocks, always_train=plan.always_train),
        params=param_table(empty, blocks, models.kept_exact(task.auto_class, config.model, shape, method)),
        architecture=architecture(empty, blocks),
        plan=plan,
        warmup_steps=warmup_steps,
        deepspeed=project(
            config,
            source,
            settings,
            total_steps=plan.total_steps,
            warmup_steps=warmup_steps,
            hidden_size=models.hidden_size(shape),
        ),
        deepspeed_name=source.name,
    )
    check_on_freeze(config, job.workload, setup_from_deepspeed(job.deepspeed, settings.world_size))
    return job


def without_freezing(job: Job, output_dir: str) -> Job:
    """Return the same job (model, rows, order, steps) as plain full fine-tuning, with a run directory of its own."""
    everything = ScheduleConfig(enabled=False)
    epochs, per_epoch = job.config.train.epochs, job.order.steps_per_epoch
    plan = make_plan(everything, len(job.blocks), epochs=epochs, steps_per_epoch=per_epoch)
    config = replace(job.config, schedule=everything, output_dir=output_dir)
    return replace(job, config=config, plan=plan)
