"""One rank: joins the process group, then runs functions sent by the pool. Imports torch late."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class RankSetup:
    """What a rank needs to know before it imports anything heavy."""

    rank: int
    world_size: int
    rendezvous: str
    log_path: str
    sys_path: tuple[str, ...]
    env: dict[str, str]


@dataclass(frozen=True)
class Call:
    """A top-level function, by name so that nothing but its arguments is pickled."""

    module: str
    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What came of a call on one rank: the pickled result, or the error in words."""

    result: bytes | None = None
    error: str | None = None
    details: str = ""


def rank_main(setup: RankSetup, conn: Connection) -> None:
    """Entry point of the spawned process: set up, report ready, serve calls until the pool hangs up."""
    log = _redirect_output(setup.log_path)
    faulthandler.enable(file=log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    sys.path[:] = setup.sys_path
    try:
        cleanup = _join_process_group(setup)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test has to show it
        conn.send(_failure(error))
        return
    conn.send(Reply(result=pickle.dumps(None)))
    while True:
        try:
            call = conn.recv()
        except EOFError:
            return
        os.ftruncate(log.fileno(), 0)
        conn.send(_serve(call, cleanup))


def _serve(call: Call, cleanup: Cleanup) -> Reply:
    try:
        function = getattr(importlib.import_module(call.module), call.name)
        # Pickled before the clean-up, which empties the engine the result may look into. Plain pickle, not
        # the pipe's own: torch teaches that one to pass tensors in shared memory, which dies with the rank.
        result = pickle.dumps(function(**call.kwargs))
        function = None
        cleanup()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test has to show it
        return _failure(error)
    return Reply(result=result)


def _failure(error: BaseException) -> Reply:
    words = traceback.format_exception_only(type(error), error)[-1].strip()
    return Reply(error=words, details="".join(traceback.format_exception(error)))


def _join_process_group(setup: RankSetup) -> Cleanup:
    from datetime import timedelta

    import deepspeed
    import torch

    torch.set_num_threads(1)
    # The shared-memory op serves inference only and takes most of a minute to compile; DeepSpeed itself falls
    # back to plain gloo where the op is not compatible.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        init_method=f"file://{setup.rendezvous}",
        rank=setup.rank,
        world_size=setup.world_size,
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=10),
        verbose=False,
    )
    torch.distributed.barrier()
    cleanup = Cleanup()
    gc.collect()
    gc.freeze()  # collections and walks of the heap then see what tests make, and take milliseconds
    return cleanup


class Cleanup:
    """Takes a process back to where it was before a test: no engines, DeepSpeed's globals as imported."""

    def __init__(self) -> None:
        import torch
        from deepspeed.runtime.zero import parameter_offload, partition_parameters
        from deepspeed.utils import groups

        self._saved = [(module, _globals_of(module)) for module in (groups, partition_parameters)]
        self._forward_stack = parameter_offload.FWD_MODULE_STACK
        self._linear = torch.nn.functional.linear

    def __call__(self) -> None:
        import torch

        _destroy_engines()
        self._forward_stack.clear()
        _forget_released_modules()
        torch.nn.functional.linear = self._linear  # ZeRO-3 leaves its own there, which rounds differently
        for module, names in self._saved:
            for name, value in names.items():
                setattr(module, name, type(value)(value) if isinstance(value, (dict, list)) else value)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        gc.collect()
        if not any(_engines()):
            gc.freeze()  # what is left are modules that the test was the first to import
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _destroy_engines() -> None:
    for engine in _engines():
        engine.destroy()


def _engines() -> Iterator[Any]:
    """Every engine alive, by a walk of the heap: a registry would mean wrapping initialize()."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    return (thing for thing in gc.get_objects() if issubclass(type(thing), DeepSpeedEngine))


def _forget_released_modules() -> None:
    """Empty ZeRO-3's cache of what to release after which module: it holds every engine there ever was."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for function in (method, *(cell.cell_contents for cell in method.__closure__ or ())):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _globals_of(module: ModuleType) -> dict[str, Any]:
    plain = (dict, list, int, float, str, type(None))
    found = {k: v for k, v in vars(module).items() if isinstance(v, plain) and not k.startswith("__")}
    return {k: type(v)(v) if isinstance(v, (dict, list)) else v for k, v in found.items()}


def _redirect_output(path: str) -> Any:
    log = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    return log


def _exit_with_parent() -> None:
    """A rank stuck in a collective would outlive a killed test run by the collective's own timeout."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
