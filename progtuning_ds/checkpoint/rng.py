"""The random number generators of one process: python, numpy, torch, and the device. No deepspeed.runtime."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

_TORCH, _DEVICE = "rng.torch", "rng.device"


def rng_tensors() -> dict[str, torch.Tensor]:
    """States that are tensors, by the name they have in the tensor file."""
    states = {_TORCH: torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states[_DEVICE] = get_accelerator().get_rng_state().cpu()
    return states


def rng_values() -> dict[str, Any]:
    """States that are plain values."""
    state: Any = np.random.get_state(legacy=False)
    key = state["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": {**state, "state": {**state["state"], "key": key}}}


def restore_rng(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Give the generators back what `rng_tensors` and `rng_values` took."""
    random.setstate(values["python"])
    state = values["numpy"]
    np.random.set_state({**state, "state": {**state["state"], "key": np.array(state["state"]["key"], dtype=np.uint32)}})
    torch.set_rng_state(tensors[_TORCH])
    if _DEVICE in tensors and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(tensors[_DEVICE])


def seed_new_rank(step: int, rank: int) -> None:
    """Seed a rank that the checkpoint knows nothing of: a function of step and rank, different on every rank."""
    seed = int.from_bytes(hashlib.sha256(f"{step}:{rank}".encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)
