"""ZeRO-3, with and without optimizer offload: ``DeepSpeedZeroOptimizer_Stage3`` in ``stage3.py``.

Owns how sub-groups follow a new trainable set. Every rank holds a fixed shard of every parameter, so no transition
moves a byte between ranks: sub-groups are dropped, split into runs of neighbours that survive, or built anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from progtuning_ds.layout import Layout, sharded_layout
from progtuning_ds.regroup import GroupPlan, GroupTarget
from progtuning_ds.transfer import split_buffer
from progtuning_ds.zero.adapter import Adapter, Parameter, forget_gradients
from progtuning_ds.zero.cut_state import cut_state
from progtuning_ds.zero.moving_weights import follow_frozen_weights
from progtuning_ds.zero.refusals import refuse_several_dtypes
from progtuning_ds.zero.shards import adjacent_runs, gathered, owns_storage, separate, view_of

_GRAD_PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
_RELEASE_CACHE = "_PartitionedParameterCoordinator__params_to_release"


@dataclass(frozen=True)
class SubGroup:
    """Parameters updated together.

    Attributes:
        params: in buffer order.
        weights: this rank's shards of them end to end, 1-D, in the model's dtype; each ``ds_tensor`` is a view of it.
        master: what the torch optimizer updates, 1-D; in fp32 without offload the same memory as ``weights``.
        group: index of its parameter group.
    """

    params: list[Parameter]
    weights: torch.Tensor
    master: torch.Tensor
    group: int

    @property
    def aliased(self) -> bool:
        """True if there is no separate master."""
        return self.master.data_ptr() == self.weights.data_ptr()


class Stage3Adapter(Adapter):
    """Retargets sub-groups."""

    REQUIRED = (
        "optimizer",
        "sub_group_to_group_id",
        "grad_partitions_flat_buffer",
        _GRAD_PARTITIONS,
        "grad_position",
        "param_dict",
        "params_already_reduced",
        "averaged_gradients",
        "parameter_offload",
        "_grad_acc_hooks",
        "_leaf_module_hooks",
        "create_reduce_and_remove_grad_hooks",
        "set_grad_positions",
    )
    PER_GROUP = frozenset(
        {
            "fp16_groups",
            "fp16_partitioned_groups",
            "fp16_partitioned_groups_flat",
            "fp16_partitioned_groups_flat_numel",
            "fp16_partitioned_groups_flat_id",
            "fp32_partitioned_groups_flat",
            "next_swappable_fp32_partitioned_groups",
            "groups_padding",
            "debug_fp16_grads",
        }
    )
    OTHER_LISTS = frozenset(
        {
            "sub_group_process_groups",
            "sub_group_partition_counts",
            "trainable_param_groups",
            "param_groups_fp16_flat_cpu_memory",
            "persistent_parameters",
        }
    )

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        if not all(param.ds_tensor.is_floating_point() for param in self.params.values()):
            refuse_several_dtypes("a quantized base")
        follow_frozen_weights(self.wrapper)

    # ---- reading -----------------------------------------------------------------------------------------------

    def read_subgroups(self) -> list[SubGroup]:
        """The current sub-groups, as DeepSpeed holds them."""
        zero = self.wrapper
        return [
            SubGroup(list(params), weights, master, zero.sub_group_to_group_id[index])
            for index, (params, weights, master) in enumerate(
                zip(
                    zero.fp16_groups,
                    zero.fp16_partitioned_groups_flat,
                    zero.fp32_partitioned_groups_flat,
                    strict=True,
                )
            )
        ]

    def groups(self) -> list[list[str]]:
        names: list[list[str]] = [[] for _ in self.torch_optimizer.param_groups]
        for sub in self.read_subgroups():
            names[sub.group].extend(self.names[id(p)] for p in sub.params)
        return names

    def layout(self) -> Layout:
        """Who owns what of the masters and their state right now; one buffer per sub-group."""
        sized = [[(self.names[id(p)], p.ds_numel) for p in sub.params] for sub in self.read_subgroups()]
        return sharded_layout(sized, self.ranks.world_size)

    def master_tensors(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def held(self, param: Parameter) -> list[torch.Tensor]:
        return [param.ds_tensor, param]  # the latter whole below the persistence threshold, else empty

    @contextmanager
    def whole(self, names: Iterable[str]) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters([self.params[name] for name in names]):
            yield

    def overwrite(self, name: str, value: torch.Tensor | None) -> None:
        param = self.params[name]
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            if value is not None:
                param.data.copy_(value)

    def adopt(self, new: Parameter, old: Parameter) -> None:
        old.convert_to_zero_parameters(param_list=[new])
        persistent = self.wrapper.persistent_parameters  # gathered after every step; a list that others share
        persistent[:] = [param for param in persistent if param is not old]

    def separate_groups(self) -> None:
        """Let the weights of one group go without those of another, with which they share DeepSpeed's one buffer."""
        refuse_several_dtypes("on_freeze")
        separate(self.read_subgroups(), getattr(self.wrapper, "lp_param_buffer", None))

    def exchange(self, new: Mapping[str, Parameter]) -> None:
        super().exchange(new)
        self._forget_trace()

    def gradient_buffers(self) -> Iterable[torch.Tensor]:
        zero = self.wrapper
        yield zero.grad_partitions_flat_buffer
        yield from (m.grad for m in zero.fp32_partitioned_groups_flat if m.grad is not None)

    def holds_gradients(self) -> bool:
        return any(value is not None for value in self.wrapper.averaged_gradients.values())

    def group_count(self) -> int:
        return len(self.wrapper.fp16_groups)

    # ---- regrouping --------------------------------------------------------------------------------------------

    def moving_masters(self, plan: GroupPlan) -> list[torch.Tensor]:
        partly = {target.source for target in plan.groups if not target.keep}
        return [sub.master for sub in self.read_subgroups() if sub.group in partly]

    def regroup(self, plan: GroupPlan, chunk_bytes: int) -> int:
        old = self.read_subgroups()
        forget_gradients(self.params[name] for name in plan.leaving)
        wanted = {name for target in plan.groups for name in target.names}
        new: list[SubGroup] = []
        for index, target in enumerate(plan.groups):
            if target.source is None:
                new.extend(self._build(target, index, chunk_bytes))
            else:
                for sub in old:
                    if sub.group == target.source:
                        new.extend(self._survivors(sub, wanted, index))
        alive = {id(sub.master) for sub in new}
        for sub in old:
            if id(sub.master) not in alive:
                self.torch_optimizer.state.pop(sub.master, None)
                sub.master.grad = None
        self.hyper.apply(plan, [[] for _ in plan.groups])
        self.install(new)
        return 0

    def _survivors(self, sub: SubGroup, wanted: set[str], group: int) -> Iterator[SubGroup]:
        """The runs of neighbours of ``sub`` that survive; the weights stay where they are."""
        runs = self._runs(sub, wanted)
        if sum(len(params) for params, _, _ in runs) == len(sub.params):
            yield replace(sub, group=group)
            return
        if not runs:
            return
        pieces = [[(start, numel)] for _, start, numel in runs]
        sizes = [numel for _, _, numel in runs]
        sub.master.grad = None
        state = self.torch_optimizer.state.pop(sub.master, {})
        states = cut_state(sub.master, state, lambda tensor: split_buffer(tensor, pieces, sizes), len(runs))
        weights = [sub.weights.narrow(0, start, numel) for _, start, numel in runs]
        masters = weights if sub.aliased else split_buffer(sub.master.detach(), pieces, sizes)
        for (params, _, _), share, cut, own in zip(runs, weights, masters, states, strict=True):
            master = cut.requires_grad_()
            if own:
                self.torch_optimizer.state[master] = own
            yield SubGroup(params, share, master, group)

    def _runs(self, sub: SubGroup, wanted: set[str]) -> list[tuple[list[Parameter], int, int]]:
        """``(parameters, start, numel)`` of each maximal run of neighbours in ``sub`` that survive."""
        runs: list[tuple[list[Parameter], int, int]] = []
        offset = 0
        previous_kept = False
        for param in sub.params:
            numel = param.partition_numel()
            kept = self.names[id(param)] in wanted
            if kept and previous_kept:
                params, start, length = runs[-1]
                runs[-1] = ([*params, param], start, length + numel)
            elif kept:
                runs.append(([param], offset, numel))
            previous_kept = kept
            offset += numel
        return runs

    def _build(self, target: GroupTarget, group: int, chunk_bytes: int) -> Iterator[SubGroup]:
        """Sub-groups for parameters that join, with fresh masters and no optimizer state yet."""
        params = [self.params[name] for name in target.names]
        for run in adjacent_runs(params):
            if len(run) > 1 or not owns_storage(run[0]):
                yield self._fresh(run, view_of(run), group)
        alone = [run[0] for run in adjacent_runs(params) if len(run) == 1 and owns_storage(run[0])]
        limit = max(1, chunk_bytes // 2)
        batch: list[Parameter] = []
        for param in alone:
            if batch and sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in [*batch, param]) > limit:
                yield self._fresh(batch, gathered(batch), group)
                batch = []
            batch.append(param)
        if batch:
            yield self._fresh(batch, gathered(batch), group)

    def _fresh(self, params: list[Parameter], weights: torch.Tensor, group: int) -> SubGroup:
        zero = self.wrapper
        dtype = zero.fp32_partitioned_groups_flat[0].dtype  # bf16 or fp16 if so configured
        if weights.dtype == dtype and weights.device == zero.device and not zero.offload_optimizer:
            # The condition under which DeepSpeed itself makes no copy (stage3.py, _create_fp32_partitions).
            return SubGroup(params, weights, weights.requires_grad_(), group)
        master = weights.detach().to(zero.device, dtype, copy=True)
        return SubGroup(params, weights, master.requires_grad_(), group)

    # ---- writing -----------------------------------------------------------------------------------------------

    def install(self, subs: list[SubGroup]) -> None:
        """Write ``subs`` into DeepSpeed's attributes and rebuild buffers, hooks and the recorded trace."""
        zero = self.wrapper
        process_group = zero.dp_process_group
        last = self.ranks.rank == self.ranks.world_size - 1
        zero.fp16_groups[:] = [sub.params for sub in subs]
        zero.fp16_partitioned_groups[:] = [[p.ds_tensor for p in sub.params] for sub in subs]
        zero.fp16_partitioned_groups_flat[:] = [sub.weights for sub in subs]
        zero.fp16_partitioned_groups_flat_numel[:] = [sub.weights.numel() for sub in subs]
        zero.fp16_partitioned_groups_flat_id[:] = [[p.ds_id for p in sub.params] for sub in subs]
        zero.fp32_partitioned_groups_flat[:] = [sub.master for sub in subs]
        zero.groups_padding[:] = [[p.padding_size() if last else 0 for p in sub.params] for sub in subs]
        zero.sub_group_to_group_id = {index: sub.group for index, sub in enumerate(subs)}
        zero.next_swappable_fp32_partitioned_groups[:] = [None] * len(subs)
        zero.debug_fp16_grads = [{} for _ in subs]
        if hasattr(zero, "sub_group_process_groups"):
            zero.sub_group_process_groups[:] = [process_group] * len(subs)
            zero.sub_group_partition_counts[:] = [self.ranks.world_size] * len(subs)
        for sub in subs:
            sub.master.ds_id = f"{sub.params[0].ds_id}_{sub.params[-1].ds_id}"
        self._renew_gradients(subs)
        self._renew_hooks()
        self._forget_trace()

    def _renew_gradients(self, subs: list[SubGroup]) -> None:
        """A gradient buffer for the new set; the old one goes first, so that both never coexist."""
        zero = self.wrapper
        params = [p for sub in subs for p in sub.params]
        zero.param_dict = {zero.get_param_id(p): p for p in params}
        zero.params_already_reduced = {zero.get_param_id(p): False for p in params}
        zero.averaged_gradients.clear()
        if hasattr(zero, "norm_for_param_grads"):
            zero.norm_for_param_grads.clear()
        zero.grad_position = {}
        zero.set_grad_positions()
        partitions = getattr(zero, _GRAD_PARTITIONS)
        partitions.clear()
        dtype, device = zero.grad_partitions_flat_buffer.dtype, zero.grad_partitions_flat_buffer.device
        zero.grad_partitions_flat_buffer = None
        buffer = torch.zeros(sum(p.partition_numel() for p in params), dtype=dtype, device=device)
        if zero.offload_optimizer_pin_memory:
            buffer = get_accelerator().pin_memory(buffer)
        zero.grad_partitions_flat_buffer = buffer
        offset = 0
        for param in params:
            partitions[param.ds_id] = buffer.narrow(0, offset, param.partition_numel())
            offset += param.partition_numel()
        if zero.offload_optimizer:
            zero.subgroup_to_device = dict.fromkeys(range(len(subs)), "cpu")
            for sub in subs:
                if sub.master.grad is None:
                    gradient = torch.zeros_like(sub.master)
                    pin = zero.offload_optimizer_pin_memory
                    sub.master.grad = get_accelerator().pin_memory(gradient) if pin else gradient

    def _renew_hooks(self) -> None:
        """Register gradient hooks anew: each knows the list of all trained parameters."""
        zero = self.wrapper
        for hook in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            hook.remove()
        zero._grad_acc_hooks = []
        zero._leaf_module_hooks = []
        with _without_gathering(p for group in zero.fp16_groups for p in group):
            zero.create_reduce_and_remove_grad_hooks()

    def _forget_trace(self) -> None:
        """Backward now visits other modules: let ZeRO-3 record its order of fetches and releases again."""
        coordinator = self.wrapper.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        cached = getattr(type(coordinator), _RELEASE_CACHE, None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@contextmanager
def _without_gathering(params: Iterable[Parameter]) -> Iterator[None]:
    """Keep hook registration from gathering every parameter: since torch 2.1 a hook needs no data to be there."""
    held = [(param, param.all_gather, param.partition) for param in params]
    for param, _, _ in held:
        param.all_gather = param.partition = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for param, all_gather, partition in held:
            param.all_gather, param.partition = all_gather, partition
