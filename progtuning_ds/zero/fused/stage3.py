"""ZeRO-3: the fused step in place of ``DeepSpeedZeroOptimizer_Stage3.step`` (``stage3.py``)."""

from __future__ import annotations

import torch

from progtuning_ds.zero.fused.step import FusedStep, MasterGroup


class Stage3Step(FusedStep):
    """One buffer per sub-group, all in one launch; the shards of the 16-bit weights are written in the same pass."""

    REQUIRED = (
        *FusedStep.REQUIRED,
        "averaged_gradients",
        "_pre_step",
        "_partition_all_parameters",
        "_overflow_clean_up",
        "_unflatten_partitioned_parameters",
        "_post_step",
    )

    def master_groups(self) -> list[MasterGroup]:
        groups = []
        for sub in self.adapter.read_subgroups():
            pieces = []
            offset = 0
            for param in sub.params:
                pieces.append((param, offset, param.partition_numel()))
                offset += param.partition_numel()
            weight = None if sub.weights.dtype == torch.float32 else sub.weights
            groups.append(MasterGroup(sub.params, pieces, sub.master, weight, sub.group))
        return groups

    def gradients(self) -> list[list[torch.Tensor]]:
        averaged = self.wrapper.averaged_gradients
        return [[gradient.contiguous().view(-1) for gradient in averaged[index]] for index in range(len(self._groups))]

    def before(self) -> None:
        self.wrapper._pre_step()
        self.wrapper._partition_all_parameters()

    def forget_gradients(self) -> None:
        zero = self.wrapper
        if zero.overflow:
            zero._overflow_clean_up(zero.loss_scale)
            return
        zero.zero_grad(set_to_none=True)
        for index in range(len(self._groups)):
            zero.averaged_gradients[index] = None

    def after(self) -> None:
        zero = self.wrapper
        for index, sub in enumerate(self.adapter.read_subgroups()):
            if sub.weights.dtype == torch.float32 and not sub.aliased:
                sub.weights.copy_(sub.master)
            zero._unflatten_partitioned_parameters(index)
        zero._post_step(set())
