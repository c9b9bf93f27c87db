"""Makes DeepSpeed's CPU Adam a function of its arguments, so that a resumed run repeats an uninterrupted one.

Its native object keeps ``beta ** step`` and multiplies it up from call to call, but takes a power where the step does
not follow the last one, as after a restart (``csrc/includes/cpu_adam.h``, ``IncrementStep``): a rounding apart, which
no checkpoint can carry, for the numbers cannot be read. Here every step takes the power.
"""

from __future__ import annotations

from typing import Any

import torch

_FAR_AWAY = 2**40
"""A step no run reaches: whichever comes next does not follow it."""


def forget_history(optimizer: torch.optim.Optimizer) -> None:
    """Start every step of a ``DeepSpeedCPUAdam`` from a power; other optimizers keep no such history."""
    native: Any = getattr(optimizer, "ds_opt_adam", None)
    if native is None or not hasattr(native, "adam_update"):
        return
    scratch = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and moments of a step that means nothing
    number = getattr(optimizer, "opt_id")  # noqa: B009 - not an attribute of torch's class

    def before_step(*_: Any) -> None:
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        native.adam_update(number, _FAR_AWAY, 0.0, beta1, beta2, 1.0, 0.0, True, *scratch)

    optimizer.register_step_pre_hook(before_step)
