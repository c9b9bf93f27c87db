"""Builds the live engine of a job: weights, DeepSpeed, stages. Uses deepspeed's public API only."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel, get_scheduler, set_seed
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from progtuning_ds.engine import StageEngine
from progtuning_ds.grouping import param_groups
from progtuning_ds.optim import register_optimizer
from progtuning_ds.train.acceleration import compile_engine
from progtuning_ds.train.job import Job
from progtuning_ds.train.models import load_model, method_of
from progtuning_ds.train.ranks import Ranks
from progtuning_ds.train.rates import boundary_factor, follow_boundaries
from progtuning_ds.zero.cpu_adam import forget_history


@dataclass
class Built:
    """A live engine that follows the job's plan."""

    engine: Any
    stages: StageEngine
    hf_deepspeed: HfDeepSpeedConfig | None
    """Kept alive: transformers looks at it, through a weak reference, to know of ZeRO-3."""

    @property
    def module(self) -> PreTrainedModel:
        """The bare model inside the engine."""
        return self.engine.module

    def close(self) -> None:
        """Free the engine's memory; the object is of no use afterwards."""
        self.engine.destroy()
        del self.engine, self.stages, self.hf_deepspeed
        unset_hf_deepspeed_config()
        gc.collect()


def build(job: Job, ranks: Ranks) -> Built:
    """Load the weights and start DeepSpeed on them. Collective.

    The new head is drawn from `train.seed` on every rank alike; dropout then differs from rank to rank.
    """
    register_optimizer()
    set_seed(job.config.train.seed)
    # A quantized base is read whole and sharded by deepspeed.initialize: transformers cannot do both at once.
    quantized = job.config.method.quantization != "none"
    hf_deepspeed = HfDeepSpeedConfig(job.deepspeed) if job.zero_stage == 3 and not quantized else None
    model = load_model(
        job.task.auto_class, job.config.model, job.shape, job.settings.precision, method_of(job.config.method)
    )
    set_seed(job.config.train.seed + ranks.rank)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=param_groups(model, job.plan, job.blocks, job.settings.weight_decay),
        config=job.deepspeed,
        lr_scheduler=_scheduler(job),
    )
    config = job.config
    stages = StageEngine(
        engine, job.plan, job.blocks, kernel=config.optimizer.kernel, on_freeze=config.schedule.on_freeze
    )
    if job.config.train.compile:
        compile_engine(engine, job.config.train.compile_backend)
    forget_history(stages.adapter.torch_optimizer)
    return Built(engine, stages, hf_deepspeed)


def _scheduler(job: Job) -> Callable[[torch.optim.Optimizer], Any] | None:
    name = job.settings.lr_scheduler_type
    if name is None:
        return None  # the DeepSpeed JSON's own
    train = job.config.train
    factor = boundary_factor(job.plan, train.boundary_warmup_steps, train.stage_lr_factor)

    def make(optimizer: torch.optim.Optimizer) -> Any:
        steps = {"num_warmup_steps": job.warmup_steps, "num_training_steps": job.plan.total_steps}
        scheduler: Any = get_scheduler(name, optimizer, **steps)
        return follow_boundaries(scheduler, factor) if train.changes_rate_at_boundaries else scheduler

    return make
