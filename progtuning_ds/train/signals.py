"""Turns a signal that asks for the end into a step boundary at which all ranks stop together. No deepspeed.runtime."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from progtuning_ds.train.ranks import Ranks

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 are noted instead of ending the process. For the main thread.

    Args:
        ranks: this process among the others.
        enabled: False leaves signals as they are, and `wanted` always answers None.
    """

    def __init__(self, ranks: Ranks, *, enabled: bool = True) -> None:
        self._ranks = ranks
        self._enabled = enabled
        self._received = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if self._enabled:
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wanted(self) -> str | None:
        """Name of a signal that any rank has received, the same answer on all ranks. Collective.

        A scheduler may signal one process only, or all at moments that lie on different sides of a step.
        """
        if not self._enabled:
            return None
        flag = torch.tensor(self._received, dtype=torch.int32, device=self._ranks.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag.item())
        return signal.Signals(number).name if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


def ignore_in_worker(_: int) -> None:
    """Let processes that load data live until the rank they work for is done, whoever signals the whole group."""
    for number in (*WATCHED, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
