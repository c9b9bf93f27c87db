"""One run at a time in a run directory. Collective; no deepspeed."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from progtuning_ds.checkpoint.agreement import on_first
from progtuning_ds.errors import CheckpointError

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run directory, which is made if it is not there; the first rank does it for all. Collective.

    The lock is the process's own (`fcntl`): it goes with the process, however that ends, and processes that load data
    do not inherit it. On a file system without locks nothing is held.

    Raises:
        CheckpointError: on all ranks, one line that names the process that holds it.
    """
    held: list[int] = []
    on_first(lambda: held.append(_acquire(folder)))
    try:
        yield
    finally:
        for handle in held:
            os.close(handle)


def _acquire(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return handle
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise CheckpointError(
            f"output_dir {str(folder)!r} is in use: {holder} runs in it; wait for its end, or give another output_dir"
        ) from error
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle
