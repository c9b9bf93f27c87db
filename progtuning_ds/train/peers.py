"""Notices that another rank has died, and ends this one with the reason instead of waiting for it for ever.

A collective that lacks a rank waits until its own timeout, half an hour by default. No deepspeed.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from types import TracebackType

import psutil
from torch.distributed import TCPStore

from progtuning_ds.train.outcome import PEER_LOST
from progtuning_ds.train.ranks import Ranks

_EVERY = 0.5
_SILENCE = 60.0  # seconds without a sign of life from a rank on another node
_FAILED = "failed"


class PeerWatch:
    """While entered, a thread looks after the next rank and listens for what any rank says of its end.

    Every rank watches one other: by its process where both are on one node, else by its heart beat in a store that
    rank 0 keeps. Who sees a death tells all.

    Args:
        ranks: this process among the others.
        expected: errors that all ranks raise together; leaving with one is no failure.
    """

    def __init__(self, ranks: Ranks, expected: tuple[type[BaseException], ...]) -> None:
        self._ranks = ranks
        self._expected = expected
        self._left = threading.Event()
        self._places: list[tuple[str, int]] = []
        self._store: TCPStore | None = None
        self._host = ""
        self._port = 0

    def __enter__(self) -> PeerWatch:
        if self._ranks.world_size > 1:
            self._host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            own = self._connect(0) if self._ranks.is_first else None
            here = (socket.gethostname(), os.getpid(), own.port if own else 0)
            everyone = self._ranks.gather(here)
            self._port = everyone[0][2]
            self._places = [(host, pid) for host, pid, _ in everyone]
            self._store = own or self._connect(self._port)
            threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        if error is None or isinstance(error, self._expected):
            try:
                self._ranks.gather(None)  # nobody leaves while another still looks for it
            except RuntimeError as lost:
                error = lost
            else:
                self._left.set()
                return
        self._left.set()
        reason = self._first_failure() or self._find_dead(patience=2.0)
        if reason is not None:  # what failed here is a consequence
            _say(self._ranks.rank, f"{reason}; this rank saw {type(error).__name__}: {_first_line(error)}")
            self._tell(reason)
            raise SystemExit(PEER_LOST) from error
        self._tell(f"rank {self._ranks.rank} failed: {type(error).__name__}: {_first_line(error)}")

    def _watch(self) -> None:
        ranks = self._ranks
        mine = self._connect(self._port)  # a store's connection is not for two threads
        neighbour = (ranks.rank + 1) % ranks.world_size
        beats, heard, last = 0, time.monotonic(), b""
        while not self._left.wait(_EVERY):
            try:
                beats += 1
                mine.set(f"beat{ranks.rank}", str(beats))
                reason = mine.get(_FAILED).decode() if mine.check([_FAILED]) else None
                if reason is None and self._is_here(neighbour):
                    reason = self._obituary(neighbour) if self._is_dead(neighbour) else None
                elif reason is None:
                    beat = mine.get(f"beat{neighbour}") if mine.check([f"beat{neighbour}"]) else b""
                    heard, last = (time.monotonic(), beat) if beat != last else (heard, last)
                    if time.monotonic() - heard > _SILENCE:
                        reason = f"rank {neighbour} on {self._places[neighbour][0]} gave no sign of life"
                    if reason is not None:
                        mine.set(_FAILED, reason)
            except (RuntimeError, OSError):  # torch's DistNetworkError among them
                reason = self._find_dead(patience=1.0) or "rank 0, which all ranks talk to, is gone"
            if reason is not None and not self._left.wait(_EVERY):
                _say(ranks.rank, reason)
                os._exit(PEER_LOST)

    def _connect(self, port: int) -> TCPStore:
        return TCPStore(self._host, port, None, is_master=port == 0, wait_for_workers=False)

    def _first_failure(self) -> str | None:
        try:
            assert self._store is not None
            return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else None
        except (RuntimeError, OSError):
            return None

    def _tell(self, reason: str) -> None:
        try:
            assert self._store is not None
            self._store.set(_FAILED, reason)
        except (RuntimeError, OSError):
            pass  # the store died with rank 0, and that is known by then

    def _find_dead(self, patience: float) -> str | None:
        """What can be said of a rank on this node that is dead, or will be in a moment."""
        deadline = time.monotonic() + patience
        while True:
            for rank in range(self._ranks.world_size):
                if rank != self._ranks.rank and self._is_here(rank) and self._is_dead(rank):
                    return self._obituary(rank)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)

    def _is_here(self, rank: int) -> bool:
        return self._places[rank][0] == self._places[self._ranks.rank][0]

    def _is_dead(self, rank: int) -> bool:
        try:
            return psutil.Process(self._places[rank][1]).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True

    def _obituary(self, rank: int) -> str:
        host, pid = self._places[rank]
        return f"rank {rank} (process {pid} on {host}) died without a word: killed, or out of memory"


def _say(rank: int, reason: str) -> None:
    print(f"error: rank {rank} stops: {reason}", file=sys.stderr, flush=True)  # noqa: T201


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
