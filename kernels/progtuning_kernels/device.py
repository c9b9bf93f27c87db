"""Device functions that the Triton kernels share: work list entries, typed addresses, the update, rounding.

Needs Triton. What an address promises (alignment) is said only where the kernel has checked it, block by block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from progtuning_kernels.rounding import KEY_STEP as _KEY_STEP
from progtuning_kernels.worklist import PIECE_COLUMNS as _PIECE_COLUMNS

PIECE_COLUMNS = tl.constexpr(_PIECE_COLUMNS)
KEY_STEP = tl.constexpr(_KEY_STEP)


@triton.jit
def piece_entry(pieces, piece, column: tl.constexpr):
    """int64 scalar: one column of a row of the table of pieces."""
    return tl.load(pieces + piece.to(tl.int64) * PIECE_COLUMNS + column)


@triton.jit
def own_tiles(tile_counts, skip, WHOLE: tl.constexpr):
    """First tile of this program and end of the tiles of its kind; none if the step is skipped."""
    number = tl.program_id(0)
    if WHOLE:
        total = tl.load(tile_counts)
    else:
        total = tl.load(tile_counts + 1)
        number += tl.load(tile_counts)
    return number, tl.where(tl.load(skip) == 0, total, 0)


@triton.jit
def load(address, offsets, mask, DTYPE: tl.constexpr, MASKED: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Elements of ``DTYPE`` at ``offsets`` from an int64 address that is a multiple of ``ALIGNMENT`` bytes."""
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)
    return tl.load(pointer + offsets, mask=mask if MASKED else None, other=0 if MASKED else None)


@triton.jit
def store(address, offsets, mask, value, DTYPE: tl.constexpr, MASKED: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Write elements of ``DTYPE``; the counterpart of `load`."""
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT)
    tl.store(pointer + offsets, value, mask=mask if MASKED else None)


@triton.jit
def load_scalars(row):
    """The numbers of a group, fp32, from its row of ``Control.scalars``."""
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
    )


@triton.jit
def adamw(p, m, v, g, grad_scale, scalars):
    """The update of `reference.adamw_`, operation by operation; fp32 throughout, IEEE square root and division.

    Kernels that call it are compiled without fusion of multiplications and additions, which would round once less.
    """
    decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step_size = scalars
    g = g * grad_scale
    p = p * decay
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + (g * g) * one_minus_beta2
    denominator = tl.sqrt_rn(v) * correction + eps
    p = p - tl.div_rn(m * step_size, denominator)
    return p, m, v


@triton.jit
def quiet_nan_or(x, bits, rounded):
    """``rounded`` (the upper 16 of 32 bits) except where fp32 ``x`` is NaN, which stays one."""
    return tl.where(x != x, (bits >> 16) | 0x40, rounded).to(tl.uint16)


@triton.jit
def bf16_nearest(x):
    """fp32 to bf16 bits (uint16), to nearest even.

    In integers, so that the interpreter, which truncates in its own conversion, computes what the hardware does.
    """
    bits = x.to(tl.uint32, bitcast=True)
    return quiet_nan_or(x, bits, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@triton.jit
def bf16_split(x):
    """fp32 to bf16 bits (uint16) and the int16 remainder, as `rounding.split`."""
    bits = x.to(tl.uint32, bitcast=True)
    upper = quiet_nan_or(x, bits, (bits + 0x8000) >> 16)
    return upper, (bits - (upper.to(tl.uint32) << 16)).to(tl.int16)


@triton.jit
def bf16_join(upper, remainder):
    """bf16 bits (uint16) and int16 remainder to fp32, as `rounding.join`."""
    bits = (upper.to(tl.uint32) << 16) + remainder.to(tl.int32).to(tl.uint32, bitcast=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bf16_widen(upper):
    """bf16 bits (uint16) to fp32."""
    return (upper.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bf16_stochastic(x, index, key):
    """fp32 to bf16 bits (uint16), as `rounding.round_stochastically` with `rounding.noise`."""
    bits = x.to(tl.uint32, bitcast=True)
    noise = scramble(scramble(index.to(tl.uint32)) + key) & 0xFFFF
    return quiet_nan_or(x, bits, (bits + noise) >> 16)


@triton.jit
def scramble(x):
    """uint32 to uint32, one to one: `rounding._mix`."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
