"""Pools of live ranks, one per world size, and what a test sees when a rank fails. Imports no DeepSpeed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.ranks.worker import Call, RankSetup, Reply, rank_main

START_TIMEOUT = 180.0
CALL_TIMEOUT = 240.0  # a first run compiles DeepSpeed's optimizers, which takes a minute or more
GRACE = 2.0  # how long the other ranks may take to say what they saw, once one has failed


class RankFailure(AssertionError):
    """A rank raised, died or did not answer; the message leads with the first one that did."""


class RankPool:
    """``world_size`` processes in one process group, ready to run functions; dead after the first failure."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.device = "cuda" if has_gpu_each(world_size) else "cpu"
        self._folder = Path(tempfile.mkdtemp(prefix=f"ranks{world_size}-"))
        context = multiprocessing.get_context("spawn")
        env = _environment(world_size)
        self._processes, self._connections = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            setup = RankSetup(
                rank=rank,
                world_size=world_size,
                rendezvous=str(self._folder / "rendezvous"),
                log_path=str(self._log(rank)),
                sys_path=tuple(sys.path),
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            process = context.Process(target=rank_main, args=(setup, there), daemon=True)
            with _environ(setup.env):  # some of it is read before Python starts
                process.start()
            there.close()  # so that a dead rank reads as end of file here
            self._processes.append(process)
            self._connections.append(here)
        self.alive = True
        self._collect("start-up", START_TIMEOUT)

    def run(self, function: Callable[..., Any], *, timeout: float = CALL_TIMEOUT, **kwargs: Any) -> list[Any]:
        """Call a top-level ``function(**kwargs)`` on every rank and return the results in rank order.

        Raises:
            RankFailure: a rank raised, died, or took over ``timeout`` seconds. The pool is then closed.
        """
        if not self.alive:
            raise RuntimeError("this pool is closed; ask the ranks fixture for a pool in each test")
        if function.__qualname__ != function.__name__:
            raise ValueError(f"ranks run top-level functions only, got {function.__qualname__}")
        for connection in self._connections:
            connection.send(Call(function.__module__, function.__name__, kwargs))
        return self._collect(f"{function.__module__}.{function.__name__}", timeout)

    def close(self) -> None:
        """End the ranks; safe to call twice."""
        self.alive = False
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.terminate()  # lets a rank that compiles an op release its lock, or nobody ever could again
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        replies: dict[int, Reply] = {}
        failed: list[int] = []  # in the order in which they were seen
        deadline = time.monotonic() + timeout
        ranks = {connection: rank for rank, connection in enumerate(self._connections)}
        while pending := [connection for connection, rank in ranks.items() if rank not in replies]:
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = ranks[connection]
                replies[rank] = self._receive(rank)
                if replies[rank].error is not None:
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failed or pending:
            message = self._describe(what, timeout, replies, failed)
            self.close()
            raise RankFailure(message)
        return [pickle.loads(replies[rank].result or b"") for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Reply:
        try:
            return self._connections[rank].recv()
        except EOFError:
            self._processes[rank].join()
            return Reply(error=f"the process died with exit code {self._processes[rank].exitcode}")

    def _describe(self, what: str, timeout: float, replies: dict[int, Reply], failed: list[int]) -> str:
        silent = [rank for rank in range(self.world_size) if rank not in replies]
        for rank in silent:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)  # makes it write its stacks to its log
        if silent:
            time.sleep(0.5)
        if failed:
            first = failed[0]
            head = f"rank {first} of {self.world_size} failed in {what}: {replies[first].error}"
        else:
            head = f"no answer from rank(s) {silent} of {self.world_size} within {timeout:g} s in {what}"
        sections = [head]
        for rank in failed:
            tail = self._log_tail(rank)
            sections.append(f"--- rank {rank}: {replies[rank].error}\n{replies[rank].details}{tail}")
        sections += [f"--- rank {rank}: still running\n{self._log_tail(rank)}" for rank in silent]
        return "\n".join(sections)

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _log_tail(self, rank: int, lines: int = 40) -> str:
        text = self._log(rank).read_text(errors="replace").strip() if self._log(rank).exists() else ""
        return "output:\n" + "\n".join(text.splitlines()[-lines:]) if text else "no output"


class RankPools:
    """``pools(2).run(function, key=value)``: one live pool per world size, started on demand."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        """The pool of ``world_size`` ranks; a fresh one if the last one was lost to a failure."""
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = RankPool(world_size)
        return pool

    def close(self) -> None:
        """End every rank of every pool."""
        for pool in self._pools.values():
            pool.close()


@contextmanager
def _environ(changes: dict[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def has_gpu_each(world_size: int) -> bool:
    """Whether there is one GPU per rank; where there is not, ranks run on the CPU and see no GPU."""
    import torch

    return torch.cuda.device_count() >= world_size


def _environment(world_size: int) -> dict[str, str]:
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # never bound: the rendezvous is a file
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DEEPSPEED_LOG_LEVEL": "warning",
        # glibc raises this threshold by itself, and then keeps freed buffers where nobody sees them go.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    if has_gpu_each(world_size):
        return common | {"DS_ACCELERATOR": "cuda"}
    # Triton reads its variable when it is first imported, which DeepSpeed may do.
    return common | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
