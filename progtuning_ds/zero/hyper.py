"""Hyper-parameters of parameter groups and the learning-rate schedulers that mirror them.

Owns the identity ("origin") of each parameter group, so that a group that went can come back with the learning rate
and weight decay it had, and the per-group lists inside LR schedulers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from progtuning_ds.regroup import GroupPlan

_SCHEDULER_LISTS = (
    # torch.optim.lr_scheduler
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "max_lrs",
    "base_momentums",
    "max_momentums",
    # deepspeed/runtime/lr_schedules.py
    "min_lr",
    "min_lrs",
    "delta_lrs",
    "org_lrs",
    "min_moms",
    "max_moms",
)
_NOT_HYPER = ("params", "step")
"""Group keys that belong to the group's own history: its tensors, and the step count FusedAdam keeps per group."""


class HyperParameters:
    """Remembers, for every parameter group there ever was, what it was configured with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.scheduler: Any | None = None
        self.origins = list(range(len(optimizer.param_groups)))
        self._configured = {origin: _settings(group) for origin, group in enumerate(optimizer.param_groups)}
        self._schedules: dict[tuple[int, str, int], Any] = {}
        self._lr_ratio: dict[int, float] = {}
        self._origin_of: dict[str, int] = {}

    def settings(self, origin: int) -> dict[str, Any]:
        """Settings of the group with identity ``origin``: the live ones if it lives, else its last ones.

        A group that comes back takes its share of today's learning rate, not the rate of the day it went.
        """
        if origin in self.origins:
            return _settings(self.optimizer.param_groups[self.origins.index(origin)])
        settings = dict(self._configured[origin])
        if origin in self._lr_ratio:
            settings["lr"] = self._lr_ratio[origin] * self.optimizer.param_groups[0]["lr"]
        return settings

    def remember(self, names: Iterable[str], origin: int) -> None:
        """Note that ``names`` are in the group with identity ``origin``, for the day they come back."""
        self._origin_of.update(dict.fromkeys(names, origin))

    def origin_for(self, name: str, decays: bool) -> int:
        """The group whose settings a parameter that joins takes.

        Its own former group if it had one; else, as weight decay is what tells groups apart, a live group without
        decay for a parameter that does not decay, and the one with most decay for one that does.
        """
        if name in self._origin_of:
            return self._origin_of[name]
        decay = {origin: self.settings(origin).get("weight_decay", 0.0) for origin in self.origins}
        return (max if decays else min)(self.origins, key=lambda origin: decay[origin])

    def apply(self, plan: GroupPlan, tensors: Sequence[list[torch.Tensor]]) -> None:
        """Make the optimizer's groups and the scheduler's lists those of ``plan``; ``tensors[i]`` go into group i.

        Groups that go are emptied: callers often still hold these dicts, and they would pin the flat master.
        """
        old = list(self.optimizer.param_groups)
        for origin, group in zip(self.origins, old, strict=True):
            self._configured[origin] = _settings(group)
            if old[0]["lr"]:
                self._lr_ratio[origin] = group["lr"] / old[0]["lr"]
        new: list[dict[str, Any]] = []
        for target, params in zip(plan.groups, tensors, strict=True):
            group = old[target.source] if target.source is not None else self.settings(target.origin)
            group["params"] = params
            new.append(group)
        kept = {id(group) for group in new}
        for group in old:
            if id(group) not in kept:
                group["params"] = []
        origins = [target.origin for target in plan.groups]
        for layer, part in enumerate(_scheduler_layers(self.scheduler)):
            self._remap(layer, part, origins)
        self.optimizer.param_groups[:] = new
        self.origins = origins

    def _remap(self, layer: int, scheduler: Any, origins: list[int]) -> None:
        for name in _SCHEDULER_LISTS:
            values = getattr(scheduler, name, None)
            if not isinstance(values, list) or len(values) != len(self.origins):
                continue
            for origin, value in zip(self.origins, values, strict=True):
                self._schedules[layer, name, origin] = value
            setattr(scheduler, name, [self._schedules[layer, name, origin] for origin in origins])


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NOT_HYPER}


def _scheduler_layers(scheduler: Any | None) -> Iterator[Any]:
    """The scheduler itself and the schedulers inside it (torch's SequentialLR, ChainedScheduler; wrappers)."""
    if scheduler is None:
        return
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", None) or ():
        yield from _scheduler_layers(inner)
    wrapped = getattr(scheduler, "scheduler", None)
    if wrapped is not None:
        yield from _scheduler_layers(wrapped)
