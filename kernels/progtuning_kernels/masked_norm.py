"""Sum of squares of the active gradients, in Triton. Reads 2 bytes per active bf16 element, and nothing frozen.

A constant number of programs each sums the tiles that are its own, in order and in fp64; one program adds their sums.
No atomics: the same gradients under the same mask give the same bits, on every device. Squares of fp32 numbers are
exact in fp64 and cannot overflow it, so NaN or inf in the sum means NaN or inf in a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from progtuning_kernels.device import load, piece_entry
from progtuning_kernels.triton_types import compile_options, triton_dtype
from progtuning_kernels.worklist import WorkList


@triton.jit
def sum_squares_kernel(
    tiles,
    tile_counts,
    pieces,
    addresses,
    partials,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [programs]. Writes ``partials`` fp64 [programs]."""
    total = tl.load(tile_counts + 1)
    number = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float64)
    while number < total:
        piece = tl.load(tiles + 2 * number)
        cell = tl.load(tiles + 2 * number + 1).to(tl.int64) * TILE
        first = piece_entry(pieces, piece, 6) - cell
        end = piece_entry(pieces, piece, 7) - cell
        address = tl.load(addresses + piece) + cell * (GRADIENT.primitive_bitwidth // 8)
        if (first <= 0) & (end >= TILE) & (address % 16 == 0):
            for block in tl.static_range(0, TILE, BLOCK):
                g = load(address, block + lanes, None, GRADIENT, False, 16).to(tl.float64)
                sums += g * g
        else:
            for block in range(0, TILE, BLOCK):
                offsets = block + lanes
                mask = (offsets >= first) & (offsets < end)
                g = load(address, offsets, mask, GRADIENT, True, 1).to(tl.float64)
                sums += g * g
        number += tl.num_programs(0)
    tl.store(partials + tl.program_id(0), tl.sum(sums, axis=0))


@triton.jit
def add_partials_kernel(partials, out, PROGRAMS: tl.constexpr):
    """Grid: [1]. Writes ``out`` fp64 [1]."""
    tl.store(out, tl.sum(tl.load(partials + tl.arange(0, PROGRAMS)), axis=0))


def masked_norm_(work: WorkList, out: torch.Tensor) -> None:
    """Write the sum of squares of the active gradients to ``out``, fp64 [1]; see `reference.masked_norm_`."""
    launch = work.launch
    partials = torch.empty(launch.norm_programs, dtype=torch.float64, device=work.device)
    sum_squares_kernel[(launch.norm_programs,)](
        work.tile_table,
        work.tile_counts,
        work.piece_table,
        work.address_table,
        partials,
        GRADIENT=triton_dtype(work.gradient_dtype),
        TILE=launch.tile,
        BLOCK=launch.block,
        num_warps=launch.warps,
        enable_fp_fusion=True,  # products are exact: fused or not, the sums have the same bits
    )
    add_partials_kernel[(1,)](partials, out, PROGRAMS=launch.norm_programs, num_warps=4, **compile_options())
