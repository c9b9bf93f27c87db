"""AdamW on the active elements, in Triton: unscale, clip, decay, update and write the 16-bit weight in one pass.

Bytes per active element with a bf16 gradient: 28 with an fp32 master (read 14, write 14), 26 with a 16-bit remainder,
22 with stochastic rounding; 2 more for an fp32 gradient. Frozen elements are in no tile: they cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
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
    own_tiles,
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
        p = load(kept, offsets, mask, tl.float32, MASKED, WIDE)
    elif PRECISION == "remainder":
        upper = load(weight, offsets, mask, tl.uint16, MASKED, WIDE16)
        p = bf16_join(upper, load(kept, offsets, mask, tl.int16, MASKED, WIDE16))
    else:
        p = bf16_widen(load(weight, offsets, mask, tl.uint16, MASKED, WIDE16))
    return p


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
        if WEIGHT == "bf16":
            store(weight, offsets, mask, bf16_nearest(p), tl.uint16, MASKED, WIDE16)
        elif WEIGHT == "fp16":
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
    block,
    first,
    end,
    index,
    key,
    grad_scale,
    hyper,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE16: tl.constexpr,
):
    """Update ``BLOCK`` elements from ``block`` on of what five addresses name, aligned as the caller has checked."""
    offsets = block + tl.arange(0, BLOCK)
    mask = (offsets >= first) & (offsets < end)
    WIDE_GRADIENT: tl.constexpr = WIDE if GRADIENT.primitive_bitwidth == 32 else WIDE16
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
    tile_counts,
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
    WHOLE: tl.constexpr,
):
    """Grid: any number of programs; they take the tiles of one kind in turn, whole and aligned ones or the others.

    Of whole tiles a thread has four neighbouring elements: 16 bytes of 32-bit tensors and 8 of 16-bit ones, which is
    as much as is said about alignment. Were 16 said of all, 16-bit elements would be laid out by eights, and converted
    through shared memory. The other tiles are read and written element by element, neighbours by neighbouring
    threads. One kernel for both kinds would lay them out alike.
    """
    number, total = own_tiles(tile_counts, skip, WHOLE)
    grad_scale = tl.load(grad_scale_at)
    key = tl.load(noise_key).to(tl.uint32)
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
        for block in range(0, TILE, BLOCK):
            if WHOLE:
                update_block(
                    kept, weight, exp_avg, exp_avg_sq, gradient, block, first, end, index, key, grad_scale, hyper,
                    GRADIENT, WEIGHT, PRECISION, BLOCK, False, 16, 8,
                )  # fmt: skip
            else:
                update_block(
                    kept, weight, exp_avg, exp_avg_sq, gradient, block, first, end, index, key, grad_scale, hyper,
                    GRADIENT, WEIGHT, PRECISION, BLOCK, True, 4, 2,
                )  # fmt: skip
        number += tl.num_programs(0)


def masked_adamw_(work: WorkList, control: Control) -> None:
    """Update the active elements as ``control`` says; see `reference.masked_adamw_`. Does not wait for the device."""
    launch_update(masked_adamw_kernel, work, control)


def launch_update(kernel: Any, work: WorkList, control: Control, *tables: torch.Tensor) -> None:
    """Launch an update kernel for the whole tiles and for the others; ``tables`` are its arguments of its own."""
    launch, buffer = work.launch, work.buffers[0]
    for whole, tiles in ((True, work.num_whole_tiles), (False, work.num_tiles - work.num_whole_tiles)):
        programs = launch.persistent_programs or tiles
        if programs == 0:
            continue
        kernel[(programs,)](
            work.tile_table,
            work.tile_counts,
            work.piece_table,
            work.address_table,
            control.skip,
            control.grad_scale,
            control.scalars,
            control.noise_key,
            *tables,
            GRADIENT=triton_dtype(work.gradient_dtype),
            WEIGHT="" if buffer.weight is None else triton_dtype(buffer.weight.dtype).name,
            PRECISION=buffer.precision,
            TILE=launch.tile,
            BLOCK=launch.block,
            WHOLE=whole,
            num_warps=launch.warps,
            **compile_options(),
        )
