"""ZeRO 0: a plain torch optimizer (fp32), and the two bit16 wrappers ``FP16_Optimizer`` and ``FP16_UnfusedOptimizer``.

No rank owns a share here: every rank holds all state, and a transition moves no byte between ranks.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable

import torch

from progtuning_ds.regroup import GroupPlan
from progtuning_ds.transfer import Ranks
from progtuning_ds.zero.adapter import Adapter, Parameter, forget_gradients
from progtuning_ds.zero.flat import FlatAdapter, FlatGroup

Pair = tuple[Parameter, torch.Tensor]
"""A parameter and the tensor the torch optimizer updates for it."""


class PerParameterAdapter(Adapter):
    """Flavours whose optimizer state hangs on one tensor per parameter."""

    @abc.abstractmethod
    def pairs(self) -> list[list[Pair]]:
        """The current groups."""

    @abc.abstractmethod
    def new_master(self, param: Parameter) -> torch.Tensor:
        """What the optimizer shall update for a parameter that joins."""

    def install(self, groups: list[list[Pair]]) -> None:
        """Write the groups into the wrapper; a plain optimizer has none."""

    def groups(self) -> list[list[str]]:
        return [[self.names[id(p)] for p, _ in group] for group in self.pairs()]

    def master_tensors(self) -> list[torch.Tensor]:
        return [master for group in self.pairs() for _, master in group]

    def gradient_buffers(self) -> Iterable[torch.Tensor]:
        return (p.grad for group in self.pairs() for p, _ in group if p.grad is not None)

    def holds_gradients(self) -> bool:
        # A step leaves either no gradients or zeros, depending on DeepSpeed's version.
        return any(bool(gradient.any()) for gradient in self.gradient_buffers())

    def regroup(self, plan: GroupPlan, chunk_bytes: int) -> int:
        masters = {self.names[id(p)]: master for group in self.pairs() for p, master in group}
        forget_gradients(self.params[name] for name in plan.leaving)
        for name in plan.leaving:
            self.torch_optimizer.state.pop(masters[name], None)
        new = [
            [
                (self.params[name], masters[name] if name in masters else self.new_master(self.params[name]))
                for name in target.names
            ]
            for target in plan.groups
        ]
        self.hyper.apply(plan, [[master for _, master in group] for group in new])
        self.install(new)
        return 0


class PlainAdapter(PerParameterAdapter):
    """fp32 without a wrapper: the optimizer updates the parameters themselves."""

    def pairs(self) -> list[list[Pair]]:
        return [[(p, p) for p in group["params"]] for group in self.torch_optimizer.param_groups]

    def new_master(self, param: Parameter) -> torch.Tensor:
        return param


class UnfusedAdapter(PerParameterAdapter):
    """bit16 with one fp32 master per parameter (any optimizer but FusedAdam)."""

    REQUIRED = ("optimizer", "fp16_groups", "fp32_groups", "overflow_checker")

    def pairs(self) -> list[list[Pair]]:
        groups = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        return [list(zip(params, masters, strict=True)) for params, masters in groups]

    def new_master(self, param: Parameter) -> torch.Tensor:
        return param.detach().clone().float().requires_grad_()

    def install(self, groups: list[list[Pair]]) -> None:
        self.wrapper.fp16_groups[:] = [[p for p, _ in group] for group in groups]
        # The wrapper and the optimizer share these lists (unfused_optimizer.py, __init__).
        self.wrapper.fp32_groups[:] = [group["params"] for group in self.torch_optimizer.param_groups]
        self.wrapper.overflow_checker.params[:] = [p for group in groups for p, _ in group]


class FusedAdapter(FlatAdapter):
    """bit16 with one flat fp32 master per group (FusedAdam); every rank holds all of it."""

    alignment = 1
    REQUIRED = (
        "optimizer",
        "fp16_groups",
        "fp16_groups_flat",
        "fp32_groups_flat",
        "overflow_checker",
        "flatten_grad_norm_mask_list",
        "has_executed_step",
    )
    PER_GROUP = frozenset({"fp16_groups", "fp16_groups_flat", "fp32_groups_flat", "flatten_grad_norm_mask_list"})

    @property
    def owners(self) -> Ranks:
        return Ranks(rank=0, world_size=1)

    def read_groups(self) -> list[FlatGroup]:
        wrapper = self.wrapper
        groups = zip(wrapper.fp16_groups, wrapper.fp16_groups_flat, wrapper.fp32_groups_flat, strict=True)
        return [FlatGroup(list(params), flat, master, i) for i, (params, flat, master) in enumerate(groups)]

    def new_master(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.detach().to(torch.float32, copy=True).requires_grad_()

    def gradient_buffers(self) -> Iterable[torch.Tensor]:
        return (p.grad for group in self.wrapper.fp16_groups for p in group if p.grad is not None)

    def holds_gradients(self) -> bool:
        return any(bool(gradient.any()) for gradient in self.gradient_buffers())

    def install(self, groups: list[FlatGroup]) -> None:
        wrapper = self.wrapper
        wrapper.fp16_groups[:] = [list(group.params) for group in groups]
        wrapper.fp16_groups_flat[:] = [group.flat for group in groups]
        wrapper.fp32_groups_flat[:] = [group.master for group in groups]
        wrapper.overflow_checker.params[:] = [p for group in groups for p in group.params]
        # The mask of replicated parameters is computed once, at the first step; it has to be computed again.
        wrapper.flatten_grad_norm_mask_list = []
        wrapper.has_executed_step = False
