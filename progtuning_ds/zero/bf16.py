"""ZeRO-1 in bf16 with fp32 gradient accumulation: ``BF16_Optimizer`` in ``bf16_optimizer.py``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from progtuning_ds.zero.flat import FlatAdapter, FlatGroup
from progtuning_ds.zero.linking import keep_linked


class BF16Adapter(FlatAdapter):
    """Like ZeRO-1, with a whole fp32 gradient buffer per group on every rank."""

    REQUIRED = (
        "optimizer",
        "fp32_groups_gradient_dict",
        "_grad_acc_hooks",
        "create_grad_acc_hooks",
        "_link_all_hp_params",
        "_lazy_init_hp_params_optimizer_state",
        "_create_param_mapping",
        "_enable_universal_checkpoint",
        "_split_flat_tensor",
        "real_dp_process_group",
        "partition_count",
        "_param_slice_mappings",
    )
    PER_GROUP = frozenset(
        {
            "bf16_groups",
            "bf16_groups_flat",
            "bf16_partitioned_groups",
            "fp32_groups_flat_partition",
            "fp32_groups_gradients",
            "fp32_groups_gradients_flat",
            "fp32_groups_actual_gradients_flat",
            "fp32_groups_gradient_flat_partition",
            "fp32_groups_has_gradients",
            "group_paddings",
            "non_expert_gradients",
        }
    )
    OTHER_LISTS = frozenset({"_muon_exchange_layouts"})

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        keep_linked(
            self.wrapper,
            lambda: zip(self.wrapper.bf16_groups, self.wrapper.fp32_groups_flat_partition, strict=True),
        )

    def read_groups(self) -> list[FlatGroup]:
        zero = self.wrapper
        return [
            FlatGroup(list(params), flat, master, index)
            for index, (params, flat, master) in enumerate(
                zip(zero.bf16_groups, zero.bf16_groups_flat, zero.fp32_groups_flat_partition, strict=True)
            )
        ]

    def new_master(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.detach().to(torch.float32, copy=True).requires_grad_()

    def holds_gradients(self) -> bool:
        return any(any(flags) for flags in self.wrapper.fp32_groups_has_gradients)

    def gradient_buffers(self) -> Iterable[torch.Tensor]:
        yield from self.wrapper.fp32_groups_gradients_flat
        yield from (p.grad for group in self.wrapper.bf16_groups for p in group if p.grad is not None)

    def install(self, groups: list[FlatGroup]) -> None:
        zero = self.wrapper
        process_group = zero.real_dp_process_group[0]
        gradients = list(zero.fp32_groups_gradients_flat)
        kept = {index for group in groups if (index := self._kept_gradient(group, gradients)) is not None}
        for index in range(len(gradients)):
            if index not in kept:
                gradients[index] = None  # goes before its successor is made
        for name in (self.PER_GROUP | self.OTHER_LISTS) & vars(zero).keys():
            getattr(zero, name).clear()
        zero.fp32_groups_gradient_dict.clear()
        zero.real_dp_process_group[:] = [process_group] * len(groups)
        zero.partition_count[:] = [self.ranks.world_size] * len(groups)
        for group in groups:
            for param in group.params:
                if "_hp_grad" in vars(param):
                    del param._hp_grad  # a view of the old gradient buffer; the next backward sets it
            index = self._kept_gradient(group, gradients)
            old = gradients[index] if index is not None else None
            self._append(group, old)
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks = []
        if zero.immediate_grad_update:
            zero.create_grad_acc_hooks()
        zero._enable_universal_checkpoint()
        zero._link_all_hp_params()
        zero._param_slice_mappings = zero._create_param_mapping()

    @staticmethod
    def _kept_gradient(group: FlatGroup, gradients: list[torch.Tensor | None]) -> int | None:
        """Index of the old gradient buffer that fits ``group``: the one of the group it was kept from."""
        if group.source is None:
            return None
        old = gradients[group.source]
        return group.source if old is not None and old.numel() == group.flat.numel() else None

    def _append(self, group: FlatGroup, gradient: torch.Tensor | None) -> None:
        zero = self.wrapper
        index = len(zero.bf16_groups)
        world, rank = self.ranks.world_size, self.ranks.rank
        share = group.flat.numel() // world
        numels = [p.numel() for p in group.params]
        if gradient is None:
            gradient = torch.zeros_like(group.flat, dtype=zero.grad_acc_dtype)
        views = zero._split_flat_tensor(flat_tensor=gradient, num_elem_list=numels)
        zero.bf16_groups.append(list(group.params))
        zero.bf16_groups_flat.append(group.flat)
        zero.bf16_partitioned_groups.append([group.flat.narrow(0, r * share, share) for r in range(world)])
        zero.fp32_groups_flat_partition.append(group.master)
        zero.fp32_groups_gradients_flat.append(gradient)
        zero.non_expert_gradients.append(gradient)
        zero.fp32_groups_gradients.append(views)
        zero.fp32_groups_gradient_dict[index] = views
        zero.fp32_groups_actual_gradients_flat.append(gradient.narrow(0, 0, sum(numels)))
        zero.fp32_groups_gradient_flat_partition.append(gradient.narrow(0, rank * share, share))
        zero.fp32_groups_has_gradients.append([False] * len(numels))
        zero.group_paddings.append(group.flat.numel() - sum(numels) if rank == world - 1 else 0)
        if hasattr(zero, "_muon_exchange_layouts"):
            zero._muon_exchange_layouts.append(None)
