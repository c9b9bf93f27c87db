"""AdamW on the active elements with 8-bit block-wise state that bitsandbytes can read, in Triton.

Bytes per active element with an fp32 master and a bf16 gradient: 16 (read 8, write 8), and 8 per 256 for the scales.
State is decoded by table and encoded by arithmetic, because a table search would cost more than the memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from progtuning_kernels.buffers import STATE_BLOCK as _STATE_BLOCK
from progtuning_kernels.control import Control
from progtuning_kernels.device import adamw, load, load_scalars, own_tiles, piece_entry, store
from progtuning_kernels.finalize import SCALAR_COLUMNS
from progtuning_kernels.masked_adamw import launch_update, load_master, store_master
from progtuning_kernels.quantization import DECADES as _DECADES
from progtuning_kernels.quantization import SMALLEST_SCALE as _SMALLEST_SCALE
from progtuning_kernels.quantization import dynamic_map
from progtuning_kernels.worklist import WorkList

STATE_BLOCK = tl.constexpr(_STATE_BLOCK)
DECADES = tl.constexpr(_DECADES)
SMALLEST_SCALE = tl.constexpr(_SMALLEST_SCALE)


@triton.jit
def enter_decade(magnitude, reached, slope, DECADE: tl.constexpr, SIGNED: tl.constexpr):
    """Move what belongs in a decade or above it up to this one: its number of bins, and bins per unit."""
    bins: tl.constexpr = 2**DECADE if SIGNED else 2 ** (DECADE + 1)
    low: tl.constexpr = 10.0 ** (DECADE - DECADES)
    first_middle: tl.constexpr = low * (1 + 4.5 / bins)
    last_middle_below: tl.constexpr = low * (1 - 0.9 / bins) if DECADE > 0 else 0.0
    enters = magnitude >= (first_middle + last_middle_below) / 2
    return tl.where(enters, bins, reached), tl.where(enters, bins / (9 * low), slope)


@triton.jit
def encode(x, SIGNED: tl.constexpr):
    """Nearest code, uint8, of fp32 values in -1..1 (or 0..1), in the map that `quantization.dynamic_map` describes.

    Decade ``i`` begins at ``10**(i - 7)`` and has ``bins`` equal bins up to the next. Near its lower end the nearest
    code may be the last one of the decade below, so it counts as reached from halfway between the two middles.
    """
    magnitude = tl.abs(x)
    reached = tl.zeros(x.shape, dtype=tl.int32)
    slope = tl.zeros(x.shape, dtype=tl.float32)
    for decade in tl.static_range(DECADES):
        reached, slope = enter_decade(magnitude, reached, slope, decade, SIGNED)
    position = tl.floor(magnitude * slope - reached.to(tl.float32) * (1.0 / 9.0)).to(tl.int32)
    position = tl.minimum(tl.maximum(position, 0), tl.maximum(reached - 1, 0))
    top: tl.constexpr = 2**DECADES if SIGNED else 2 ** (DECADES + 1)
    last_middle: tl.constexpr = 1 - 0.9 / top
    code = tl.where(x >= (1 + last_middle) / 2, top, reached + position)
    signed_code = top - 1 + tl.where(x < 0, -code, code)
    return (signed_code if SIGNED else tl.maximum(code - 1, 0)).to(tl.uint8)


@triton.jit
def scaled_codes(x, SIGNED: tl.constexpr):
    """Codes [rows, 256] and scales [rows] of fp32 values [rows, 256]."""
    scale = tl.max(tl.abs(x), axis=1)
    inverse = tl.where(scale >= SMALLEST_SCALE, tl.div_rn(1.0, tl.maximum(scale, SMALLEST_SCALE)), 0.0)
    return encode(x * inverse[:, None], SIGNED), scale


@triton.jit
def update_rows(
    kept,
    weight,
    codes,
    codes_sq,
    absmax,
    absmax_sq,
    gradient,
    row,
    first,
    end,
    index,
    key,
    grad_scale,
    hyper,
    signed_map,
    unsigned_map,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE16: tl.constexpr,
    WIDE8: tl.constexpr,
):
    """Update ``ROWS`` blocks of state from block ``row`` on, with the alignment that the caller checked."""
    rows = row + tl.arange(0, ROWS)
    lanes = tl.arange(0, STATE_BLOCK)
    offsets = row * STATE_BLOCK + tl.arange(0, ROWS)[:, None] * STATE_BLOCK + lanes[None, :]
    mask = (offsets >= first) & (offsets < end)
    row_mask = (rows * STATE_BLOCK >= first) & (rows * STATE_BLOCK < end)
    WIDE_GRADIENT: tl.constexpr = WIDE if GRADIENT.primitive_bitwidth == 32 else WIDE16
    p = load_master(kept, weight, offsets, mask, PRECISION, MASKED, WIDE, WIDE16)
    code = load(codes, offsets, mask, tl.uint8, MASKED, WIDE8)
    code_sq = load(codes_sq, offsets, mask, tl.uint8, MASKED, WIDE8)
    scale = load(absmax, rows, row_mask, tl.float32, MASKED, 4)
    scale_sq = load(absmax_sq, rows, row_mask, tl.float32, MASKED, 4)
    g = load(gradient, offsets, mask, GRADIENT, MASKED, WIDE_GRADIENT).to(tl.float32)
    m = tl.load(signed_map + code.to(tl.int32)) * scale[:, None]
    v = tl.load(unsigned_map + code_sq.to(tl.int32)) * scale_sq[:, None]
    p, m, v = adamw(p, m, v, g, grad_scale, hyper)
    if MASKED:  # what lies beyond a piece must not raise the scale
        m = tl.where(mask, m, 0.0)
        v = tl.where(mask, v, 0.0)
    code, scale = scaled_codes(m, True)
    code_sq, scale_sq = scaled_codes(v, False)
    store(codes, offsets, mask, code, tl.uint8, MASKED, WIDE8)
    store(codes_sq, offsets, mask, code_sq, tl.uint8, MASKED, WIDE8)
    store(absmax, rows, row_mask, scale, tl.float32, MASKED, 4)
    store(absmax_sq, rows, row_mask, scale_sq, tl.float32, MASKED, 4)
    store_master(kept, weight, offsets, mask, p, index, key, WEIGHT, PRECISION, MASKED, WIDE, WIDE16)


@triton.jit
def masked_adamw_8bit_kernel(
    tiles,
    tile_counts,
    pieces,
    addresses,
    skip,
    grad_scale_at,
    scalars,
    noise_key,
    signed_map,
    unsigned_map,
    GRADIENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Grid: any number of programs; they take the tiles of one kind in turn. Pieces begin with a block of state."""
    number, total = own_tiles(tile_counts, skip, WHOLE)
    grad_scale = tl.load(grad_scale_at)
    key = tl.load(noise_key).to(tl.uint32)
    while number < total:
        piece = tl.load(tiles + 2 * number)
        cell = tl.load(tiles + 2 * number + 1).to(tl.int64) * TILE
        KEPT_BYTES: tl.constexpr = 4 if PRECISION == "master" else 2
        kept = piece_entry(pieces, piece, 0) + cell * KEPT_BYTES
        weight = piece_entry(pieces, piece, 1) + cell * 2
        codes = piece_entry(pieces, piece, 2) + cell
        codes_sq = piece_entry(pieces, piece, 3) + cell
        absmax = piece_entry(pieces, piece, 4) + cell // STATE_BLOCK * 4
        absmax_sq = piece_entry(pieces, piece, 5) + cell // STATE_BLOCK * 4
        gradient = tl.load(addresses + piece) + cell * (GRADIENT.primitive_bitwidth // 8)
        first = (piece_entry(pieces, piece, 6) - cell).to(tl.int32)
        end = tl.minimum(piece_entry(pieces, piece, 7) - cell, TILE).to(tl.int32)
        hyper = load_scalars(scalars + piece_entry(pieces, piece, 8) * SCALAR_COLUMNS)
        index = piece_entry(pieces, piece, 9) + cell
        for block in range(0, TILE, BLOCK):
            if WHOLE:
                update_rows(
                    kept, weight, codes, codes_sq, absmax, absmax_sq, gradient, block // STATE_BLOCK, first, end,
                    index, key, grad_scale, hyper, signed_map, unsigned_map,
                    GRADIENT, WEIGHT, PRECISION, BLOCK // STATE_BLOCK, False, 16, 8, 4,
                )  # fmt: skip
            else:
                update_rows(
                    kept, weight, codes, codes_sq, absmax, absmax_sq, gradient, block // STATE_BLOCK, first, end,
                    index, key, grad_scale, hyper, signed_map, unsigned_map,
                    GRADIENT, WEIGHT, PRECISION, BLOCK // STATE_BLOCK, True, 4, 2, 1,
                )  # fmt: skip
        number += tl.num_programs(0)


def masked_adamw_8bit_(work: WorkList, control: Control) -> None:
    """Update the active elements as ``control`` says; see `reference.masked_adamw_`. Does not wait for the device."""
    maps = dynamic_map(True, work.device), dynamic_map(False, work.device)
    launch_update(masked_adamw_8bit_kernel, work, control, *maps)
