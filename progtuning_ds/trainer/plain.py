"""Owns stages over an ordinary PyTorch optimizer: who is in its groups, and the state it holds. No deepspeed.

Every process holds all state here (one process, or plain DDP), so nothing crosses ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from progtuning_ds.blocks import BlockMap, set_trainable
from progtuning_ds.grouping import free_backward
from progtuning_ds.schedule import Stage, StagePlan
from progtuning_ds.transition import StageTransition, describe

logger = logging.getLogger(__name__)


class PlainStages:
    """Makes an optimizer follow a stage plan: `advance(step)` before each optimizer step, as `StageEngine` has it.

    A frozen parameter leaves the `params` of its group and loses its gradient and optimizer state; one that joins
    returns to its group with fresh state. The groups themselves stay, empty ones too, so that learning-rate
    schedulers, which count groups, need not know.

    Args:
        model: the bare module.
        optimizer: a torch optimizer over all parameters that ever train; a wrapper's inner one.
        plan: what trains when.
        blocks: what `discover_blocks(model)` returned.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: StagePlan, blocks: BlockMap) -> None:
        self.model = model
        self.optimizer = optimizer
        self.plan = plan
        self.blocks = blocks
        self.changed = False
        """Whether what trains has changed since a wrapper of the model was last told (see `rebuild_ddp`)."""
        self._stage: Stage | None = None
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._homes: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        free_backward(model, plan, blocks)

    def take_over(self, before: PlainStages) -> None:
        """Go on with the optimizer of an earlier run, in which parameters may have left their groups."""
        self._homes = before._homes
        for group, home in zip(self.optimizer.param_groups, self._homes, strict=True):
            group["params"] = list(home)

    @property
    def stage(self) -> Stage:
        """The current stage; stage 0 before the first `advance`."""
        return self._stage or self.plan.stages[0]

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Names of the parameters that the optimizer holds, in its order."""
        return tuple(self._names[id(p)] for group in self.optimizer.param_groups for p in group["params"])

    def memory(self) -> dict[str, int]:
        """Bytes this process holds: weights, gradients and optimizer state."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = sum(_state_bytes(self.optimizer, p) for p in held)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "optimizer_state": state,
            "gradients": sum(gradient.nbytes for gradient in gradients),
        }

    def advance(self, step: int) -> StageTransition | None:
        """Enter the stage that optimizer step `step` belongs to; None if it is the current one, or trains the same.

        Raises:
            ValueError: if `step` is outside the plan.
        """
        stage = self.plan.stage_at(step)
        if self._stage is not None and stage.index == self._stage.index:
            return None
        self._stage = stage
        target = self.blocks.trainable_names(stage, self.plan.always_train)
        before = set(self.trainable_names)
        if set(target) == before:
            return None
        transition = self._retarget(target, before, stage.index, step)
        logger.info("%s", describe(transition, len(self.plan.stages)))
        return transition

    def _retarget(self, target: Sequence[str], before: set[str], stage: int, step: int) -> StageTransition:
        began, held = time.perf_counter(), self.memory()
        wanted = set(target)
        set_trainable(self.model, target)
        for group, home in zip(self.optimizer.param_groups, self._homes, strict=True):
            group["params"] = [p for p in home if self._names[id(p)] in wanted]
        for parameter in (p for home in self._homes for p in home if self._names[id(p)] not in wanted):
            parameter.grad = None
            self.optimizer.state.pop(parameter, None)
        self.changed = True
        after = self.memory()
        now = self.trainable_names
        return StageTransition(
            stage=stage,
            step=step,
            frozen=tuple(name for name in self.blocks.order if name in before and name not in wanted),
            unfrozen=tuple(name for name in now if name not in before),
            released_bytes={key: held[key] - after[key] for key in held},
            memory_bytes=after,
            moved_bytes=0,
            planned=True,
            seconds=time.perf_counter() - began,
        )


def rebuild_ddp(ddp: DistributedDataParallel) -> None:
    """Make a DDP wrapper reduce what requires grad now; collective, and in place, because a loop holds the object.

    DDP fixes what it reduces when it is built, and waits for a gradient of each of those in every backward.
    """
    old: Any = ddp
    module, hooks = ddp.module, list(ddp._comm_hooks)
    settings = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "broadcast_buffers": ddp.broadcast_buffers,
        "init_sync": False,  # the ranks hold the same weights
        "process_group": ddp.process_group,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
    }
    training = ddp.training
    old.logger = None
    old.reducer = None  # the old one takes its hooks off the parameters as it goes
    ddp.__init__(module, **settings)
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    ddp.train(training)


def _state_bytes(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> int:
    return sum(value.nbytes for value in optimizer.state.get(parameter, {}).values() if torch.is_tensor(value))
