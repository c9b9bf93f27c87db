"""Moments that wait in host memory between steps, group by group. Imports torch; no deepspeed.runtime.

ZeRO steps one parameter group (ZeRO-3: one sub-group) at a time. Hooks of the torch optimizer bring the moments of a
waiting group to the device just before its step and take them back right after, so the device holds those of one
group at most. Masters and gradients stay on the device and the arithmetic is the same to the bit. On CPU ranks, whose
device is host memory, moments wait in a file that is mapped into memory and already has no name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from progtuning_ds.transfer import release_pages
from progtuning_ds.zero import Adapter
from progtuning_ds.zero.linking import follow_states

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostMoments:
    """Keeps the moments of some parts away from the device.

    Args:
        adapter: of the ZeRO engine; the groups of its torch optimizer have the names of ``param_groups``.
        stages: number of stages; the group ``always`` leaves after the last one.
    """

    def __init__(self, adapter: Adapter, stages: int) -> None:
        self.adapter = adapter
        self.optimizer = optimizer = adapter.torch_optimizer
        self.waiting: frozenset[int] = frozenset()
        """Stages after which the groups that wait leave."""
        self._last = stages - 1
        self._homes: Any = WeakIdKeyDictionary()
        optimizer.register_step_pre_hook(self._fetch)
        optimizer.register_step_post_hook(self._store)

    def keep_away(self, parts: Collection[int]) -> int:
        """From now on, and at once, exactly these parts wait; moments of others that waited come home.

        Returns:
            Bytes that came to the device.
        """
        self.waiting = frozenset(parts)
        moved = 0
        for master, state in list(self.optimizer.state.items()):
            home = self._homes.get(master)
            if home is not None and home["part"] not in self.waiting:
                self._bring(master, state)
                moved += sum(home[name].nbytes for name in MOMENTS)
                del self._homes[master]
        self._store(self.optimizer)  # those that a checkpoint has just brought
        return moved

    def waiting_bytes(self) -> int:
        """Bytes of moments that are away now."""
        return sum(home[name].nbytes for home in self._homes.values() for name in MOMENTS)

    def _part(self, group: dict[str, Any]) -> int:
        name = str(group.get("name", "")).split(".")[0]
        return int(name.removeprefix("part")) if name.startswith("part") else self._last

    def _fetch(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                if master in self._homes and master in optimizer.state:
                    self._bring(master, optimizer.state[master])

    def _store(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            part = self._part(group)
            for master in group["params"] if part in self.waiting else ():
                state = optimizer.state.get(master, {})
                if all(name in state for name in MOMENTS):
                    self._take(master, state, part)
        follow_states(self.adapter.wrapper)

    def _bring(self, master: torch.Tensor, state: dict[str, Any]) -> None:
        for name in MOMENTS:
            # The tensor stays, so that whoever holds it sees its contents wherever they lie.
            state[name].data = self._homes[master][name].to(master.device, copy=True)

    def _take(self, master: torch.Tensor, state: dict[str, Any], part: int) -> None:
        home = self._homes.get(master)
        if home is None:
            home = self._homes[master] = {name: _room(state[name]) for name in MOMENTS} | {"part": part}
        for name in MOMENTS:
            home[name].copy_(state[name])
            state[name].data = home[name]
            if master.device.type == "cpu":
                release_pages(home[name])  # of a shared mapping: they leave memory, the file keeps them


def _room(tensor: torch.Tensor) -> torch.Tensor:
    """Memory like a tensor's on the host: pinned, or a mapped file without a name where the device is the CPU."""
    if tensor.device.type != "cpu":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with tempfile.TemporaryDirectory(prefix="progtuning-") as folder:
        path = str(Path(folder) / "moments")
        return torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
