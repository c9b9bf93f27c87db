"""Ends a rank without warning at a named point of the program, the n-th time it gets there."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kill:
    """A signal at the `nth` passage of `point`, counted from 1, on the ranks named; SIGKILL by default."""

    point: str
    nth: int
    ranks: tuple[int, ...]
    signal: int = signal.SIGKILL


def points() -> dict[str, tuple[Any, str, bool]]:
    """Where a rank can be ended: owner and name of a function, and whether after it instead of before.

    Before the inner optimizer's step gradients are reduced; after it masters have moved and weights have not.
    """
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from progtuning_ds.checkpoint import saving, sharing, store, tensor_file
    from progtuning_ds.train import loop, session
    from progtuning_ds.zero.hyper import HyperParameters

    return {
        "forward": (DeepSpeedEngine, "forward", False),
        "backward": (DeepSpeedEngine, "backward", False),
        "after backward": (DeepSpeedEngine, "backward", True),
        "optimizer step": (torch.optim.AdamW, "step", False),
        "half an engine step": (torch.optim.AdamW, "step", True),
        "retarget": (HyperParameters, "apply", False),
        "half a retarget": (HyperParameters, "apply", True),
        "evaluation": (loop, "evaluate", False),
        "before a save": (saving, "rank_state", False),
        "between write and sync": (tensor_file.os, "fsync", False),
        "between files": (saving, "link_or_write", True),
        "after a link": (sharing.os, "link", True),
        "before the manifest": (saving, "write_manifest", False),
        "between write and rename": (store.CheckpointStore, "publish", False),
        "between rename and latest": (store.CheckpointStore, "_point_to", False),
        "after latest": (store.CheckpointStore, "_point_to", True),
        "rotation": (store, "remove_tree", False),
        "half a rotation": (store, "remove_tree", True),
        "export": (session, "save_final", False),
        "after export": (session, "save_final", True),
    }


def arm(kill: Kill | None, rank: int) -> Counter[str]:
    """Set the trap in this process, or none; returns how often each point has been passed, kept up to date."""
    passed: Counter[str] = Counter()
    for name, (owner, attribute, after) in points().items():
        if kill is None or (name == kill.point and rank in kill.ranks):
            setattr(owner, attribute, _wrap(getattr(owner, attribute), name, after, passed, kill))
    return passed


def _wrap(function: Callable[..., Any], name: str, after: bool, passed: Counter[str], kill: Kill | None) -> Any:
    def passage() -> None:
        passed[name] += 1
        if kill is not None and passed[name] == kill.nth:
            os.kill(os.getpid(), kill.signal)

    def trapped(*args: Any, **kwargs: Any) -> Any:
        if not after:
            passage()
        result = function(*args, **kwargs)
        if after:
            passage()
        return result

    return trapped
