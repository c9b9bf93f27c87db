"""Owns the three steps of a `Trainer` run that stages take part in. Imports transformers; no deepspeed.

A callback is told of none of them: making the optimizer, the moment between engine and checkpoint, loading the best
model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from progtuning_ds.blocks import set_trainable
from progtuning_ds.grouping import free_backward
from progtuning_ds.trainer.layout import lay_out

if TYPE_CHECKING:
    from progtuning_ds.trainer.callback import ProgtuningCallback

    _Base = Trainer
else:
    _Base = object


class Progressive(_Base):
    """What a Trainer's class gets in front of it; `super()` is the class it had."""

    progtuning: ProgtuningCallback

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as ever; under DeepSpeed, with groups laid out so that planned boundaries cost nothing."""
        plan, blocks = self.progtuning.begin(self)
        model: Any = self.model
        if self.is_deepspeed_enabled:
            set_trainable(model, blocks.trainable_names(plan.stages[0], plan.always_train))
            free_backward(model, plan, blocks)
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled:
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.param_groups[:] = lay_out(optimizer.param_groups, model, plan, blocks)
            else:  # accelerate's stand-in for an optimizer of the DeepSpeed JSON
                params = list(optimizer.params)
                groups = params if params and isinstance(params[0], dict) else [{"params": params}]
                optimizer.params = lay_out(groups, model, plan, blocks)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler as ever. Engine and optimizer exist then, and no checkpoint has been loaded yet."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if optimizer is None:  # else DeepSpeed is asking, in the middle of building its engine
            self.progtuning.prepared(self)
        return scheduler

    def _load_best_model(self) -> None:
        """Load the best checkpoint as ever; under DeepSpeed into the layout that it was saved in."""
        folder = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled and folder is not None:
            saved = json.loads((Path(folder) / TRAINER_STATE_NAME).read_text())
            self.progtuning.go_back_to(max(saved["global_step"] - 1, 0))
        super()._load_best_model()


def make_progressive(trainer: Any, callback: ProgtuningCallback) -> None:
    """Put `Progressive` in front of a trainer's class.

    The class and not the object, because transformers copies trainers and calls these methods on the copy.
    """
    trainer.progtuning = callback
    kind = type(trainer)
    if not issubclass(kind, Progressive):
        trainer.__class__ = type(kind.__name__, (Progressive, kind), {"__module__": kind.__module__})
