"""Which optimizers a fused AdamW step may stand in for, and how their state and settings are read."""

from __future__ import annotations

from typing import Any

import torch

from progtuning_ds.optim import MaskedAdamW


def why_not_adamw(optimizer: torch.optim.Optimizer) -> str | None:
    """Say why ``optimizer`` computes something else than AdamW with decoupled weight decay; None if it does not."""
    kind = type(optimizer).__name__
    if kind == "FusedAdam":  # deepspeed.ops.adam, which the type "AdamW" in a DeepSpeed JSON means on a GPU
        if not getattr(optimizer, "adam_w_mode", 0):
            return "FusedAdam with adam_w_mode off couples weight decay with the gradient"
        if not all(group.get("bias_correction", True) for group in optimizer.param_groups):
            return "FusedAdam runs without bias correction"
        return None
    if type(optimizer) not in (torch.optim.AdamW, MaskedAdamW):
        return f"the fused step is AdamW's, and the optimizer is {kind}; use AdamW or progtuning_ds.MaskedAdamW"
    if getattr(optimizer, "state_bits", 32) != 32:
        return f"the fused step keeps moments in fp32, and {kind} has state_bits={optimizer.state_bits}"
    for option in ("amsgrad", "maximize"):
        if any(group.get(option) for group in optimizer.param_groups):
            return f"the fused step has no {option}, which the optimizer asks for"
    return None


def state_of(optimizer: torch.optim.Optimizer, master: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """State of one master, made if there is none yet: ``exp_avg``, ``exp_avg_sq`` (fp32 [n]), ``step`` (fp32, CPU)."""
    state = optimizer.state[master]
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(master, dtype=torch.float32, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(master, dtype=torch.float32, requires_grad=False)
    if "step" not in state:
        # FusedAdam counts per group, in the group.
        state["step"] = torch.tensor(float(group.get("step", 0)), dtype=torch.float32)
    if not torch.is_tensor(state["step"]) or state["step"].device.type != "cpu":
        # torch's own fused AdamW counts on the device, where reading it would wait for the device.
        state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    return state
