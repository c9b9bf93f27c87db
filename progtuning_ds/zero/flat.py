"""Flavours whose parameter groups are flat buffers: ZeRO-1/2, BF16_Optimizer and the fused stage-0 optimizer.

Owns what they share: keeping, compacting, building and dropping flat groups. A flavour adds how DeepSpeed's
attributes are read (``read_groups``) and written (``install``).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from progtuning_ds.layout import FLAT_ALIGNMENT, Layout, flat_layout, flat_offsets, padded_numel
from progtuning_ds.regroup import GroupPlan, GroupTarget
from progtuning_ds.repartition import RepartitionPlan, check_exact, order_survivors, plan_repartition
from progtuning_ds.transfer import Ranks, carry, drain, split_buffer, zero_gaps
from progtuning_ds.zero.adapter import Adapter, Parameter, forget_gradients, unlink
from progtuning_ds.zero.cut_state import cut_state


@dataclass(frozen=True)
class FlatGroup:
    """One parameter group as flat buffers.

    Attributes:
        params: in buffer order.
        flat: the weights, 1-D, padded, the same on all ranks; each ``p.data`` is a view of it.
        master: this rank's share, 1-D; what the torch optimizer updates.
        source: index of the old group it was kept from or compacted from, None for a group built anew.
    """

    params: list[Parameter]
    flat: torch.Tensor
    master: torch.Tensor
    source: int | None


class FlatAdapter(Adapter):
    """Retargets flat groups."""

    alignment = FLAT_ALIGNMENT

    @property
    def owners(self) -> Ranks:
        """The ranks that divide a master among them; all of the data-parallel group unless a flavour says otherwise."""
        return self.ranks

    @abc.abstractmethod
    def read_groups(self) -> list[FlatGroup]:
        """The current groups, as DeepSpeed holds them."""

    @abc.abstractmethod
    def install(self, groups: list[FlatGroup]) -> None:
        """Write ``groups`` into DeepSpeed's attributes and rebuild hooks and links."""

    @abc.abstractmethod
    def new_master(self, weights: torch.Tensor) -> torch.Tensor:
        """A fresh master for this rank's share ``weights`` of a flat buffer, as the flavour would create it."""

    def forget_buffers(self, leaving: Sequence[Parameter]) -> None:
        """Release what a flavour holds for ``leaving`` beside masters and state, before anything new is made."""

    def groups(self) -> list[list[str]]:
        return [[self.names[id(p)] for p in group.params] for group in self.read_groups()]

    def master_tensors(self) -> list[torch.Tensor]:
        return [group.master for group in self.read_groups()]

    def layout(self) -> Layout:
        """Who owns what of the masters and their state right now."""
        sized = [[(self.names[id(p)], p.numel()) for p in group.params] for group in self.read_groups()]
        return flat_layout(sized, self.owners.world_size, alignment=self.alignment)

    def moving_masters(self, plan: GroupPlan) -> list[torch.Tensor]:
        old = self.read_groups()
        return [old[t.source].master for t in plan.groups if t.source is not None and not t.keep]

    def regroup(self, plan: GroupPlan, chunk_bytes: int) -> int:
        old = self.read_groups()
        leaving = [self.params[name] for name in plan.leaving]
        forget_gradients(leaving, ("grad", "grad_accum"))
        unlink(leaving)
        self.forget_buffers(leaving)
        sources = {target.source for target in plan.groups}
        for index, group in enumerate(old):
            if index not in sources:
                self._drop_state(group.master)
        moved = 0
        new: list[FlatGroup] = []
        for target in plan.groups:
            if target.keep:
                assert target.source is not None
                new.append(replace(old[target.source], source=target.source))
            elif target.source is not None:
                group, between = self._compact(old[target.source], target, chunk_bytes)
                new.append(group)
                moved += between
            else:
                new.append(self._build(target))
        self.hyper.apply(plan, [[group.master] for group in new])
        self.install(new)
        return moved

    def _drop_state(self, master: torch.Tensor) -> None:
        self.torch_optimizer.state.pop(master, None)
        master.grad = None

    # ---- one group loses members -------------------------------------------------------------------------------

    def _compact(self, old: FlatGroup, target: GroupTarget, chunk_bytes: int) -> tuple[FlatGroup, int]:
        old_sized = [(self.names[id(p)], p.numel()) for p in old.params]
        old_layout = flat_layout([old_sized], self.owners.world_size, alignment=self.alignment)
        kept = set(target.names)
        order = order_survivors(old_layout, 0, [item for item in old_sized if item[0] in kept])
        new_layout = flat_layout([order], self.owners.world_size, alignment=self.alignment)
        plan = plan_repartition(old_layout, new_layout)
        check_exact(plan, old_layout, new_layout)
        params = [self.params[name] for name, _ in order]
        old.master.grad = None
        flat = self._split_weights(old, params)
        master, moved = self._carry_state(old.master, plan, new_layout, chunk_bytes)
        return FlatGroup(params, flat, master, target.source), moved

    def _split_weights(self, old: FlatGroup, survivors: list[Parameter]) -> torch.Tensor:
        """Give survivors a flat buffer of their own and each leaver its own storage; the old buffer goes."""
        kept = {id(p) for p in survivors}
        leavers = [p for p in old.params if id(p) not in kept]
        starts = {
            id(p): start for p, start in zip(old.params, flat_offsets([p.numel() for p in old.params]), strict=True)
        }
        pieces = [[(starts[id(p)], p.numel()) for p in survivors], *([(starts[id(p)], p.numel())] for p in leavers)]
        sizes = [self.padded(survivors), *(p.numel() for p in leavers)]
        buffers = split_buffer(old.flat, pieces, sizes)
        bind(survivors, buffers[0])
        for param, buffer in zip(leavers, buffers[1:], strict=True):
            bind([param], buffer)
        return buffers[0]

    def _carry_state(
        self, old: torch.Tensor, plan: RepartitionPlan, new_layout: Layout, chunk_bytes: int
    ) -> tuple[torch.Tensor, int]:
        moved = 0
        share = new_layout.partition_numel[0]

        def carry_on(tensor: torch.Tensor) -> list[torch.Tensor]:
            nonlocal moved
            moved += plan.numel_between_ranks * tensor.element_size()
            return [self._carry_one(tensor, plan, new_layout, chunk_bytes, share)]

        [state] = cut_state(old, self.torch_optimizer.state.pop(old, {}), carry_on, parts=1)
        [master] = carry_on(old.detach())
        master.requires_grad_()
        if state:
            self.torch_optimizer.state[master] = state
        return master, moved

    def _carry_one(
        self, tensor: torch.Tensor, plan: RepartitionPlan, new_layout: Layout, chunk_bytes: int, share: int
    ) -> torch.Tensor:
        pinned = tensor.device.type == "cpu" and tensor.is_pinned()
        buffer = carry(plan, {0: tensor}, new_layout, self.owners, chunk_bytes=chunk_bytes)[0]
        assert buffer.numel() == share
        return buffer.pin_memory() if pinned else buffer

    # ---- parameters that join ----------------------------------------------------------------------------------

    def _build(self, target: GroupTarget) -> FlatGroup:
        """A group of its own for parameters that join: weights gathered into one buffer, no optimizer state yet."""
        params = [self.params[name] for name in target.names]
        flat = self._gather_weights(params)
        share = flat.numel() // self.owners.world_size
        master = self.new_master(flat.narrow(0, self.owners.rank * share, share))
        return FlatGroup(params, flat, master, None)

    def _gather_weights(self, params: list[Parameter]) -> torch.Tensor:
        """Copy ``params`` into one flat buffer through host memory; storages they leave empty are released.

        Frozen parameters that lived in the same storage get one of their own, or they would pin it.
        """
        device, dtype = params[0].device, params[0].dtype
        neighbours = self._frozen_neighbours(params)
        staged = torch.empty(self.padded(params), dtype=dtype)
        zero_gaps(staged, [(0, sum(p.numel() for p in params))])
        offset = 0
        for param in params:
            numel = param.numel()
            drain(param.data.view(-1), staged.narrow(0, offset, numel))
            offset += numel
        for neighbour in neighbours:
            neighbour.data = neighbour.data.clone()
        shapes = [p.shape for p in params]
        for param in params:
            param.data = torch.empty(0, dtype=dtype, device=device)
        flat = staged.to(device)
        bind(params, flat, shapes)
        return flat

    def _frozen_neighbours(self, params: list[Parameter]) -> list[Parameter]:
        joining = {id(p) for p in params}
        storages = {p.data.untyped_storage().data_ptr() for p in params}
        trained = {id(p) for group in self.read_groups() for p in group.params}
        return [
            p
            for p in self.params.values()
            if id(p) not in joining and id(p) not in trained and p.data.untyped_storage().data_ptr() in storages
        ]

    def padded(self, params: Sequence[Parameter]) -> int:
        return padded_numel(sum(p.numel() for p in params), self.owners.world_size, self.alignment)


def bind(params: Sequence[Parameter], flat: torch.Tensor, shapes: Sequence[torch.Size] | None = None) -> None:
    """Make ``p.data`` of each parameter a view of ``flat``, end to end."""
    offset = 0
    for param, shape in zip(params, shapes or [p.shape for p in params], strict=True):
        numel = shape.numel()
        param.data = flat.narrow(0, offset, numel).view(shape)
        offset += numel
