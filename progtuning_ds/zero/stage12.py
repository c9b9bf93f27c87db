"""ZeRO-1 and ZeRO-2, with and without optimizer offload: ``DeepSpeedZeroOptimizer`` in ``stage_1_and_2.py``.

Owns how that class's per-group lists, id-keyed dictionaries, gradient hooks and offload buffers follow a new set of
groups. Every list is written anew from the groups, kept ones included: nothing is patched in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from progtuning_ds.layout import flat_offsets
from progtuning_ds.zero.adapter import Parameter
from progtuning_ds.zero.flat import FlatAdapter, FlatGroup
from progtuning_ds.zero.linking import keep_linked

_BIT16_STAGING = "param_buffer_of_bit16_for_cpu_offload_groups"
"""With offload, since 0.17: host buffers the updated weights pass through on their way to the device."""


class Stage12Adapter(FlatAdapter):
    """One file for both: they differ in when gradients are reduced, not in how state is held."""

    REQUIRED = (
        "optimizer",
        "param_id",
        "param_dict",
        "params_already_reduced",
        "is_param_in_current_partition",
        "averaged_gradients",
        "offload_gradient_dict",
        "_grad_acc_hooks",
        "create_gradient_handling_hooks",
        "get_data_parallel_partitions",
        "get_partition_info",
        "initialize_gradient_partitioning_data_structures",
        "reset_partition_gradient_structures",
        "_update_model_bit16_weights",
        "_link_all_hp_params",
        "_lazy_init_hp_params_optimizer_state",
        "_create_param_mapping",
        "_enable_universal_checkpoint",
    )
    PER_GROUP = frozenset(
        {
            "bit16_groups",
            "bit16_groups_flat",
            "parallel_partitioned_bit16_groups",
            "single_partition_of_fp32_groups",
            "params_in_partition",
            "params_not_in_partition",
            "first_offset",
            "partition_size",
            "groups_padding",
            "round_robin_bit16_groups",
            "round_robin_bit16_indices",
            "round_robin_bit16_meta",
            "real_dp_process_group",
            "partition_count",
            "_param_slice_mappings",
        }
    )
    OTHER_LISTS = frozenset({_BIT16_STAGING, "round_robin_bit16_padding", "round_robin_bit16_offsets"})
    _GROUP_DICTS = (
        "param_to_partition_ids",
        "is_partition_reduced",
        "remaining_grads_in_partition",
        "total_grads_in_partition",
        "is_grad_computed",
        "grad_partition_insertion_offset",
        "grad_start_offset",
        "averaged_gradients",
        "all_grad_tensors",
        "offload_gradient_dict",
        "first_param_index_in_partition",
        "previous_reduced_grads",
    )
    """Dictionaries keyed by group index; emptied in place, because links hold some of them."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._normalise_order()
        keep_linked(
            self.wrapper,
            lambda: zip(self.wrapper.bit16_groups, self.wrapper.single_partition_of_fp32_groups, strict=True),
        )

    def _normalise_order(self) -> None:
        """Call the order in the flat buffer the order of the group.

        With ``round_robin_gradients`` DeepSpeed shuffles the buffer but computes its high-precision links from the
        order of the group, so ``safe_get_full_*`` reads other parameters' elements.
        """
        zero = self.wrapper
        for index, params in enumerate(zero.round_robin_bit16_groups):
            zero.bit16_groups[index] = list(params)
            zero.round_robin_bit16_indices[index] = list(range(len(params)))
            for position, param in enumerate(params):
                param.param_idx_in_group = position

    def read_groups(self) -> list[FlatGroup]:
        zero = self.wrapper
        return [
            FlatGroup(list(params), flat, master, index)
            for index, (params, flat, master) in enumerate(
                zip(zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True)
            )
        ]

    def new_master(self, weights: torch.Tensor) -> torch.Tensor:
        zero = self.wrapper
        dtype = zero.single_partition_of_fp32_groups[0].dtype  # bf16 or fp16 if so configured
        master = weights.detach().to(zero.device, dtype, copy=True)
        if zero.cpu_offload and zero.cpu_offload_pin_memory:
            master = get_accelerator().pin_memory(master)
        return master.requires_grad_()

    def holds_gradients(self) -> bool:
        held = any(value is not None for value in self.wrapper.averaged_gradients.values())
        return held or any(p.grad is not None for group in self.wrapper.bit16_groups for p in group)

    def gradient_buffers(self) -> Iterable[torch.Tensor]:
        zero = self.wrapper
        yield from (m.grad for m in zero.single_partition_of_fp32_groups if m.grad is not None)
        if zero.cpu_offload:
            yield from zero.accumulated_grads_in_cpu.values()
            yield from getattr(zero, _BIT16_STAGING, ())
            yield zero.temp_grad_buffer_for_cpu_offload
            yield zero.temp_grad_buffer_for_gpu_offload

    def forget_buffers(self, leaving: Sequence[Parameter]) -> None:
        zero = self.wrapper
        for name in self._GROUP_DICTS:
            by_group = getattr(zero, name, None)
            if by_group is not None:  # some appeared after 0.16, some are None until first used
                by_group.clear()
        if zero.cpu_offload:
            for param in leaving:
                zero.accumulated_grads_in_cpu.pop(zero.get_param_id(param), None)

    def install(self, groups: list[FlatGroup]) -> None:
        zero = self.wrapper
        accumulated = self._accumulated_by_param() if zero.cpu_offload else {}
        process_group = zero.real_dp_process_group[0]
        for name in (self.PER_GROUP | self.OTHER_LISTS) & vars(zero).keys() - {"_param_slice_mappings"}:
            entry = _ENTRIES.get(name)
            getattr(zero, name)[:] = [entry(group) for group in groups] if entry else []  # filled below
        zero.real_dp_process_group[:] = [process_group] * len(groups)
        zero.partition_count[:] = [self.ranks.world_size] * len(groups)
        for group in groups:
            self._partition(group)
        self._renumber(groups)
        if zero.cpu_offload:
            self._offload_buffers(groups, accumulated)
        zero.initialize_gradient_partitioning_data_structures()
        zero.reset_partition_gradient_structures()
        self._renew_hooks()
        zero._enable_universal_checkpoint()
        zero._link_all_hp_params()
        zero._param_slice_mappings = zero._create_param_mapping()
        if zero.cpu_offload and hasattr(zero, "_create_optimizer_mapping"):  # since 0.17
            zero._create_optimizer_mapping()

    def _partition(self, group: FlatGroup) -> None:
        """Append what follows from a group's flat buffer and this rank's place in it (``__init__`` does the same)."""
        zero = self.wrapper
        index = len(zero.partition_size)
        rank = self.ranks.rank
        shares = zero.get_data_parallel_partitions(group.flat, index)
        zero.parallel_partitioned_bit16_groups.append(shares)
        size = group.flat.numel() // self.ranks.world_size
        inside, outside, first = zero.get_partition_info(group.params, size, rank)
        zero.partition_size.append(size)
        zero.params_in_partition.append(inside)
        zero.params_not_in_partition.append(outside)
        zero.first_offset.append(first)
        end = sum(p.numel() for p in group.params)
        zero.groups_padding.append(min(size, max(0, (rank + 1) * size - end)))
        if hasattr(zero, _BIT16_STAGING):
            getattr(zero, _BIT16_STAGING).append(self._bit16_buffer(group))

    def _bit16_buffer(self, group: FlatGroup) -> torch.Tensor:
        buffer = torch.zeros(group.master.shape, dtype=group.flat.dtype, device=group.master.device)
        return get_accelerator().pin_memory(buffer) if self.wrapper.cpu_offload_pin_memory else buffer

    def _renumber(self, groups: list[FlatGroup]) -> None:
        zero = self.wrapper
        params = [p for group in groups for p in group.params]
        zero.param_id = {id(p): number for number, p in enumerate(params)}
        zero.param_dict = dict(enumerate(params))
        zero.params_already_reduced = [False] * len(params)
        zero.is_param_in_current_partition = {}
        for owned, side in ((True, zero.params_in_partition), (False, zero.params_not_in_partition)):
            for param in (p for group in side for p in group):
                zero.is_param_in_current_partition[zero.get_param_id(param)] = owned
        for group in groups:
            for position, param in enumerate(group.params):
                param.param_idx_in_group = position
                param.grad_accum = None

    def _renew_hooks(self) -> None:
        """Register gradient hooks anew: each knows its group's index and the list of all trained parameters."""
        zero = self.wrapper
        if not zero._grad_acc_hooks:
            return  # ZeRO-1 without contiguous gradients reduces at the end of backward and has none
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks = []
        zero.create_gradient_handling_hooks()

    # ---- optimizer offload -------------------------------------------------------------------------------------

    def _accumulated_by_param(self) -> dict[int, torch.Tensor]:
        zero = self.wrapper
        return {id(zero.param_dict[number]): buffer for number, buffer in zero.accumulated_grads_in_cpu.items()}

    def _accumulation_buffer(self, param: Parameter) -> torch.Tensor:
        buffer = torch.zeros(param.numel(), dtype=param.dtype, device=self.wrapper.device)
        return get_accelerator().pin_memory(buffer) if self.wrapper.cpu_offload_pin_memory else buffer

    def _offload_buffers(self, groups: list[FlatGroup], accumulated: dict[int, torch.Tensor]) -> None:
        zero = self.wrapper
        params: list[Parameter] = [p for group in groups for p in group.params]
        # DeepSpeed makes these on first use, one for each parameter this rank owns a piece of.
        owned = [p for group in zero.params_in_partition for p in group] if accumulated else []
        zero.accumulated_grads_in_cpu = {
            zero.get_param_id(p): accumulated[id(p)] if id(p) in accumulated else self._accumulation_buffer(p)
            for p in owned
        }
        zero.norm_for_param_grads = {}
        zero.grad_position = {}
        for index in range(len(groups)):
            zero.get_grad_position(
                index, zero.params_in_partition[index], zero.first_offset[index], zero.partition_size[index]
            )
        for group in groups:
            if group.master.grad is None:
                gradient = torch.zeros_like(group.master)
                pin = zero.cpu_offload_pin_memory
                group.master.grad = get_accelerator().pin_memory(gradient) if pin else gradient
        largest = max(p.numel() for p in params)
        if zero.temp_grad_buffer_for_cpu_offload.numel() != largest:
            for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload"):
                old = getattr(zero, name)
                new = torch.zeros(largest, dtype=old.dtype, device=old.device)
                setattr(zero, name, get_accelerator().pin_memory(new) if old.is_pinned() else new)


_ENTRIES = {
    "bit16_groups": lambda group: list(group.params),
    "bit16_groups_flat": lambda group: group.flat,
    "single_partition_of_fp32_groups": lambda group: group.master,
    "round_robin_bit16_groups": lambda group: list(group.params),
    "round_robin_bit16_indices": lambda group: list(range(len(group.params))),
    "round_robin_bit16_meta": lambda group: [torch.empty_like(p.data, device="meta") for p in group.params],
    "round_robin_bit16_padding": lambda group: [0] * len(group.params),
    "round_robin_bit16_offsets": lambda group: list(flat_offsets([p.numel() for p in group.params])),
}
"""Per-group lists that follow from the group alone; the others follow from this rank's place in it."""
