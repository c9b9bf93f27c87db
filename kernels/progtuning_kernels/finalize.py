"""The decision about a step, in Triton: one program, fp64, no host. See `reference.finalize_` for what it decides."""

from __future__ import annotations

import triton
import triton.language as tl

from progtuning_kernels.control import HYPER_COLUMNS as _HYPER_COLUMNS
from progtuning_kernels.control import SCALAR_COLUMNS as _SCALAR_COLUMNS
from progtuning_kernels.control import Control
from progtuning_kernels.device import KEY_STEP
from progtuning_kernels.triton_types import compile_options

HYPER_COLUMNS = tl.constexpr(_HYPER_COLUMNS)
SCALAR_COLUMNS = tl.constexpr(_SCALAR_COLUMNS)


@triton.jit
def integer_power(base, exponent):
    """``base ** exponent`` by squaring, as `reference.integer_power`; fp64 and int64 blocks."""
    result = tl.full(base.shape, 1.0, tl.float64)
    for bit in tl.static_range(31):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def finalize_kernel(
    hyper,
    limits,
    sum_of_squares,
    active,
    steps,
    norm,
    skip,
    skipped,
    grad_scale,
    scalars,
    updates,
    noise_key,
    seed,
    num_groups,
    GROUPS: tl.constexpr,
):
    """Grid: [1]. ``GROUPS`` is a power of two that is at least ``num_groups``."""
    total = tl.load(sum_of_squares)
    valid = tl.where(total < float("inf"), 1, 0)  # 0 for NaN too
    loss_scale = tl.load(limits)
    max_norm = tl.load(limits + 1)
    past_updates = tl.load(updates)
    tl.store(skip, 1 - valid)
    tl.store(skipped, tl.load(skipped) + 1 - valid)
    tl.store(noise_key, (seed + past_updates * KEY_STEP) & 0xFFFFFFFF)
    tl.store(updates, past_updates + valid)

    unscaled_norm = tl.sqrt(total) / loss_scale
    tl.store(norm, unscaled_norm)
    clips = max_norm > 0
    excess = tl.where(clips, (unscaled_norm + 1e-6) / tl.where(clips, max_norm, 1.0), 1.0)
    tl.store(grad_scale, (1.0 / (loss_scale * tl.maximum(excess, 1.0))).to(tl.float32))

    group = tl.arange(0, GROUPS)
    exists = group < num_groups
    trains = tl.load(active + group, mask=exists, other=0)
    count = tl.load(steps + group, mask=exists, other=0) + trains * valid
    tl.store(steps + group, count, mask=exists)
    count = tl.maximum(count, 1)
    row = hyper + group * HYPER_COLUMNS
    lr = tl.load(row + 0, mask=exists, other=0.0)
    beta1 = tl.load(row + 1, mask=exists, other=0.0)
    beta2 = tl.load(row + 2, mask=exists, other=0.0)
    eps = tl.load(row + 3, mask=exists, other=0.0)
    weight_decay = tl.load(row + 4, mask=exists, other=0.0)
    row = scalars + group * SCALAR_COLUMNS
    tl.store(row + 0, (1.0 - lr * weight_decay).to(tl.float32), mask=exists)
    tl.store(row + 1, (1.0 - beta1).to(tl.float32), mask=exists)
    tl.store(row + 2, beta2.to(tl.float32), mask=exists)
    tl.store(row + 3, (1.0 - beta2).to(tl.float32), mask=exists)
    tl.store(row + 4, (1.0 / tl.sqrt(1.0 - integer_power(beta2, count))).to(tl.float32), mask=exists)
    tl.store(row + 5, eps.to(tl.float32), mask=exists)
    tl.store(row + 6, (lr / (1.0 - integer_power(beta1, count))).to(tl.float32), mask=exists)


def finalize_(control: Control) -> None:
    """Decide about the step; see `reference.finalize_`."""
    num_groups = len(control.steps)
    finalize_kernel[(1,)](
        control.hyper,
        control.limits,
        control.sum_of_squares,
        control.active,
        control.steps,
        control.norm,
        control.skip,
        control.skipped,
        control.grad_scale,
        control.scalars,
        control.updates,
        control.noise_key,
        control.seed,
        num_groups,
        GROUPS=triton.next_power_of_2(num_groups),
        num_warps=1,
        **compile_options(),
    )
