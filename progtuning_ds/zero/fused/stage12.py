"""ZeRO-1 and ZeRO-2: the fused step in place of ``DeepSpeedZeroOptimizer.step`` (``stage_1_and_2.py``)."""

from __future__ import annotations

import torch
from deepspeed.runtime.utils import all_gather_dp_groups

from progtuning_ds.layout import flat_offsets
from progtuning_ds.zero.adapter import Parameter
from progtuning_ds.zero.flat import FlatGroup
from progtuning_ds.zero.fused.step import FusedStep, MasterGroup

_NO_MICRO_STEP = -1
"""``INITIAL_MICRO_STEP_ID``: no backward since the last step."""


class Stage12Step(FusedStep):
    """Reads unflattened gradients, and writes this rank's share of the 16-bit weights in the same pass."""

    REQUIRED = (
        *FusedStep.REQUIRED,
        "micro_step_id",
        "averaged_gradients",
        "free_grad_in_param_list",
        "params_in_partition",
        "params_not_in_partition",
        "parallel_partitioned_bit16_groups",
        "bit16_groups_flat",
        "real_dp_process_group",
        "nccl_start_alignment_factor",
        "allgather_bucket_size",
        "_update_model_bit16_weights",
        "_lazy_init_hp_params_optimizer_state",
    )

    def master_groups(self) -> list[MasterGroup]:
        groups = self.adapter.read_groups()
        return [self._master_group(index, group) for index, group in enumerate(groups)]

    def _master_group(self, index: int, group: FlatGroup) -> MasterGroup:
        weight = self._own_weights(index)
        return MasterGroup(
            params=group.params,
            pieces=self._own_pieces(group),
            master=group.master,
            weight=None if weight.dtype == torch.float32 else weight,
            group=index,
        )

    def _own_weights(self, index: int) -> torch.Tensor:
        return self.wrapper.parallel_partitioned_bit16_groups[index][self.adapter.ranks.rank]

    def _own_pieces(self, group: FlatGroup) -> list[tuple[Parameter, int, int]]:
        """What of each parameter lies in this rank's share, as places in the share."""
        share = group.master.numel()
        first = self.adapter.ranks.rank * share
        pieces = []
        for param, offset in zip(group.params, flat_offsets([p.numel() for p in group.params]), strict=True):
            start, stop = max(offset, first), min(offset + param.numel(), first + share)
            if start < stop:
                pieces.append((param, start - first, stop - start))
        return pieces

    def gradients(self) -> list[list[torch.Tensor]]:
        return [self._own_gradients(index, entry) for index, entry in enumerate(self._groups)]

    def _own_gradients(self, index: int, entry: MasterGroup) -> list[torch.Tensor]:
        """DeepSpeed's list, padding left out: it fills the share from its beginning to its end."""
        at: dict[int, torch.Tensor] = {}
        offset = 0
        for gradient in self.wrapper.averaged_gradients[index]:
            at[offset] = gradient
            offset += gradient.numel()
        return [at[start].contiguous().view(-1) for _, start, _ in entry.pieces]

    def before(self) -> None:
        self.wrapper.micro_step_id = _NO_MICRO_STEP

    def forget_gradients(self) -> None:
        zero = self.wrapper
        if zero.overflow:
            zero.zero_grad(set_to_none=True)
        release = getattr(zero, "_release_preflattened_grad_buffers", None)
        if release is not None:  # since 0.18
            release()
        for index in range(len(self._groups)):
            zero.free_grad_in_param_list(zero.params_not_in_partition[index])
            zero.free_grad_in_param_list(zero.params_in_partition[index])
            zero.averaged_gradients[index] = None
            if hasattr(zero, "all_grad_tensors"):  # since 0.17
                zero.all_grad_tensors[index] = None

    def after(self) -> None:
        zero = self.wrapper
        for index, entry in enumerate(self._groups):
            if entry.weight is None:
                self._own_weights(index).copy_(entry.master)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        for index in range(len(self._groups)):
            zero._update_model_bit16_weights(index)
        zero._lazy_init_hp_params_optimizer_state()
