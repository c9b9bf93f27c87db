"""Starts the training program on real ranks, each its own process, in about a second: they are forked ready-made."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.trap import Kill, arm

PROMPTLY = 40.0  # seconds in which all ranks must have ended, once one has been killed


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes (negative for a signal), what they said, seconds from first to last end."""

    codes: tuple[int, ...]
    said: str
    lasted: float


def launch(
    arguments: list[str],
    folder: Path,
    *,
    world_size: int = 2,
    kill: Kill | None = None,
    count_into: Path | None = None,
    prepare: Callable[[], None] | None = None,
    timeout: float = 120.0,
) -> Ended:
    """Run `launch/train.py` with these arguments on every rank and wait for all of them to end by themselves.

    Args:
        arguments: of the command line.
        folder: for what the ranks print.
        world_size: number of ranks.
        kill: a trap for some of them.
        count_into: where rank 0 writes how often it passed each point.
        prepare: a top-level function that every rank calls first.
        timeout: seconds after which they have hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),  # or the fork server could not load what it preloads
    }
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    processes = [
        context.Process(
            target=_rank_main,
            args=(rank, common, arguments, str(logs[rank]), kill, count_into if rank == 0 else None, prepare),
        )
        for rank in range(world_size)
    ]
    with _environ(common):  # what the fork server is started with
        for process in processes:
            process.start()
    first = None
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if first is None and any(process.exitcode is not None for process in processes):
            first = time.monotonic()
        if time.monotonic() > deadline or (first is not None and time.monotonic() > first + PROMPTLY):
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGUSR2)  # shows where it hangs
            time.sleep(0.5)
            for process in processes:
                process.kill()
            texts = "\n".join(log.read_text(errors="replace")[-6000:] for log in logs if log.exists())
            raise AssertionError(f"ranks did not end by themselves, {[p.exitcode for p in processes]}:\n{texts}")
        time.sleep(0.02)
    now = time.monotonic()
    codes = tuple(process.exitcode or 0 for process in processes)
    said = "".join(log.read_text(errors="replace") for log in logs)
    return Ended(codes, said, now - (first or now))


def _rank_main(
    rank: int,
    env: dict[str, str],
    arguments: list[str],
    log: str,
    kill: Kill | None,
    count_into: Path | None,
    prepare: Callable[[], None] | None,
) -> None:
    os.environ |= env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGUSR2, file=2)
    if prepare is not None:
        prepare()
    passed = arm(kill, rank) if kill is not None or count_into is not None else Counter[str]()
    from progtuning_ds.train.cli import main

    code = main(arguments)
    if count_into is not None:
        count_into.write_text(json.dumps(passed))
    sys.exit(code)


class _environ:
    def __init__(self, changes: dict[str, str]) -> None:
        self.changes = changes

    def __enter__(self) -> None:
        self.saved = dict(os.environ)
        os.environ.update(self.changes)

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self.saved)
