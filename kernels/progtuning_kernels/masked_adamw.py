"""AdamW on the active elements, in Triton: unscale, clip, decay, update and write the 16-bit weight in one pass.

Bytes per active element with a bf16 gradient: 28 with an fp32 master (read 14, write 14), 26 with a 16-bit remainder,
22 with stochastic rounding; 2 more for an fp32 gradient. Frozen elements are in no tile: they cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from progtuning_kernels.control import Control
from progtuning_kernels.device import (
    adamw,
    bf16_join,
    bf16_nearest,
    bf16_split,
    bf16_stochastic,
    bf16_widen,
    load,
    load_scalars,
    piece_entry,
    store,
)
from progtuning_kernels.finalize import SCALAR_COLUMNS
from progtuning_kernels.triton_types import compile_options, triton_dtype
from progtuning_kernels.worklist import WorkList


@triton.jit
def load_master(
    kept, weight, offsets, mask, PRECISION: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, WIDE16: tl.constexpr
):
    """fp32 weights, from wherever their full precision is."""
    if PRECISION == "master":
        return load(kept, offsets, mask, tl.float32, MASKED, WIDE)
    else:
        upper = load(weight, offsets, mask, tl.uint16, MASKED, WIDE16)
        if PRECISION == "remainder":
            return bf16_join(upper, load(kept, offsets, mask, tl.int16, MASKED, WIDE16))
        else:
            return bf16_widen(upper)


@triton.jit
def store_master(
    kept,
    weight,
    offsets,
    mask,
    p,
    index,
    key,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE16: tl.constexpr,
):
    """Write fp32 weights and their 16-bit rounding; the counterpart of `load_master`."""
    if PRECISION == "master":
        store(kept, offsets, mask, p, tl.float32, MASKED, WIDE)
        if WEIGHT == tl.bfloat16:
            store(weight, offsets, mask, bf16_nearest(p), tl.uint16, MASKED, WIDE16)
        elif WEIGHT == tl.float16:
            store(weight, offsets, mask, p.to(tl.float16), tl.float16, MASKED, WIDE16)
    elif PRECISION == "remainder":
        upper, remainder = bf16_split(p)
        store(weight, offsets, mask, upper, tl.uint16, MASKED, WIDE16)
        store(kept, offsets, mask, remainder, tl.int16, MASKED, WIDE16)
    else:
        store(weight, offsets, mask, bf16_stochastic(p, index + offsets, key), tl.uint16, MASKED, WIDE16)


@triton.jit
def update_block(
    kept,
    weight,
    exp_avg,
    exp_avg_sq,
    gradient,
    offsets,
    first,
    end,
    index,
    key,
    grad_scale,
    hyper,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE16: tl.constexpr,
):
    """Update the elements at ``offsets`` (block) from five addresses, with the alignment that the caller checked."""
    mask = (offsets >= first) & (offsets < end)
    WIDE_GRADIENT: tl.constexpr = WIDE if GRADIENT == tl.float32 else WIDE16
    p = load_master(kept, weight, offsets, mask, PRECISION, MASKED, WIDE, WIDE16)
    m = load(exp_avg, offsets, mask, tl.float32, MASKED, WIDE)
    v = load(exp_avg_sq, offsets, mask, tl.float32, MASKED, WIDE)
    g = load(gradient, offsets, mask, GRADIENT, MASKED, WIDE_GRADIENT).to(tl.float32)
    p, m, v = adamw(p, m, v, g, grad_scale, hyper)
    store(exp_avg, offsets, mask, m, tl.float32, MASKED, WIDE)
    store(exp_avg_sq, offsets, mask, v, tl.float32, MASKED, WIDE)
    store_master(kept, weight, offsets, mask, p, index, key, WEIGHT, PRECISION, MASKED, WIDE, WIDE16)


@triton.jit
def masked_adamw_kernel(
    tiles,
    tile_count,
    pieces,
    addresses,
    skip,
    grad_scale_at,
    scalars,
    noise_key,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CONTIGUITY: tl.constexpr = 4,
):
    """Grid: any number of programs; they take tiles in turn. ``CONTIGUITY`` elements are a thread's own neighbours.

    Without the cap at 4, tiles that mix 16-bit and 32-bit elements are laid out differently for each and converted
    through shared memory.
    """
    total = tl.where(tl.load(skip) == 0, tl.load(tile_count), 0)
    grad_scale = tl.load(grad_scale_at)
    key = tl.load(noise_key).to(tl.uint32)
    number = tl.program_id(0)
    while number < total:
        piece = tl.load(tiles + 2 * number)
        cell = tl.load(tiles + 2 * number + 1).to(tl.int64) * TILE
        KEPT_BYTES: tl.constexpr = 4 if PRECISION == "master" else 2
        kept = piece_entry(pieces, piece, 0) + cell * KEPT_BYTES
        weight = piece_entry(pieces, piece, 1) + cell * 2
        exp_avg = piece_entry(pieces, piece, 2) + cell * 4
        exp_avg_sq = piece_entry(pieces, piece, 3) + cell * 4
        gradient = tl.load(addresses + piece) + cell * (GRADIENT.primitive_bitwidth // 8)
        first = (piece_entry(pieces, piece, 6) - cell).to(tl.int32)
        end = tl.minimum(piece_entry(pieces, piece, 7) - cell, TILE).to(tl.int32)
        hyper = load_scalars(scalars + piece_entry(pieces, piece, 8) * SCALAR_COLUMNS)
        index = piece_entry(pieces, piece, 9) + cell
        wide, wide16 = exp_avg | exp_avg_sq, weight
        if PRECISION == "master":
            wide = wide | kept
        else:
            wide16 = wide16 | kept
        if GRADIENT == tl.float32:
            wide = wide | gradient
        else:
            wide16 = wide16 | gradient
        whole = (first <= 0) & (end == TILE) & (wide % 16 == 0)
        for block in range(0, TILE, BLOCK):
            offsets = block + tl.max_contiguous(tl.arange(0, BLOCK), CONTIGUITY)
            if whole & (wide16 % 8 == 0):
                update_block(
                    kept, weight, exp_avg, exp_avg_sq, gradient, offsets, first, end, index, key, grad_scale, hyper,
                    GRADIENT, WEIGHT, PRECISION, False, 16, 8,
                )  # fmt: skip
            elif whole:
                update_block(
                    kept, weight, exp_avg, exp_avg_sq, gradient, offsets, first, end, index, key, grad_scale, hyper,
                    GRADIENT, WEIGHT, PRECISION, False, 16, 2,
                )  # fmt: skip
            else:
                update_block(
                    kept, weight, exp_avg, exp_avg_sq, gradient, offsets, first, end, index, key, grad_scale, hyper,
                    GRADIENT, WEIGHT, PRECISION, True, 4, 2,
                )  # fmt: skip
        number += tl.num_programs(0)


def masked_adamw_(work: WorkList, control: Control) -> None:
    """Update the active elements as ``control`` says; see `reference.masked_adamw_`. Does not wait for the device."""
    launch, buffer = work.launch, work.buffers[0]
    programs = launch.persistent_programs or work.num_tiles
    if programs == 0:
        return
    masked_adamw_kernel[(programs,)](
        work.tile_table,
        work.tile_count,
        work.piece_table,
        work.address_table,
        control.skip,
        control.grad_scale,
        control.scalars,
        control.noise_key,
        GRADIENT=triton_dtype(work.gradient_dtype),
        WEIGHT=triton_dtype(None if buffer.weight is None else buffer.weight.dtype),
        PRECISION=buffer.precision,
        TILE=launch.tile,
        BLOCK=launch.block,
        num_warps=launch.warps,
        **compile_options(),
    )
