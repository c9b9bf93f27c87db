"""Reads optimizer state in 8-bit blocks into a buffer that cuts parameters elsewhere. No deepspeed.runtime.

A cut moves block boundaries: elements are read with the scale they had, and blocks are formed anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from progtuning_kernels import STATE_BLOCK

from progtuning_ds.checkpoint.fragments import Fragments, codes_of
from progtuning_ds.checkpoint.tensor_file import TensorReader
from progtuning_ds.errors import CheckpointError, UnsupportedStateError
from progtuning_ds.zero.cut_state import BLOCK_SCALES, BLOCK_TABLES, block_again, is_signed
from progtuning_ds.zero.held_state import HeldBuffer


def read_blockwise(
    buffer: HeldBuffer, source: Mapping[str, Any], file: str, fragments: Fragments, reader: TensorReader
) -> dict[str, torch.Tensor]:
    """Return the 8-bit state of a buffer, on the CPU, from wherever its elements were.

    Elements of a block that was not cut keep code and scale to the bit; the others move by at most half a step of the
    quantization map (`progtuning_ds.zero.cut_state`). 5 bytes an element are held on the way, for one kind of state.

    Args:
        buffer: what is to be filled.
        source: description of a saved buffer that speaks for it.
        file: where that one's tensors are.
        fragments: where the elements of all parameters are.
        reader: reads them.

    Raises:
        CheckpointError: for state that is not in blocks this version knows.
    """
    held = source["opaque"]
    codes = [key for key, scales in BLOCK_SCALES.items() if key in held and scales in held]
    tables = {key: reader.read(file, held[key]) for key in BLOCK_TABLES.values() if key in held}
    known = {*codes, *(BLOCK_SCALES[key] for key in codes), *tables}
    if set(held) != known:
        raise CheckpointError(f"optimizer state {min(set(held) - known)!r} is in no blocks that are known")
    state: dict[str, torch.Tensor] = dict(tables)
    for key in codes:
        values = torch.zeros(buffer.master.numel(), dtype=torch.uint8)
        spread = torch.zeros(values.shape)  # the scale of every element; zero where there is none
        for span in buffer.spans:
            for piece in fragments.slices(codes_of(key), span.param, span.start, span.numel):
                at = slice(span.offset + piece.at, span.offset + piece.at + piece.stop - piece.start)
                values[at] = _codes(reader, piece.file, piece.tensor, piece.start, piece.stop)
                first, last = piece.start // STATE_BLOCK, -(-piece.stop // STATE_BLOCK)
                name = piece.tensor.removesuffix(key) + BLOCK_SCALES[key]
                scales = reader.read(piece.file, name, first, last).repeat_interleave(STATE_BLOCK)
                spread[at] = scales[piece.start - first * STATE_BLOCK :][: piece.stop - piece.start]
        try:
            signed = is_signed(key, tables)
        except UnsupportedStateError as error:
            raise CheckpointError(
                f"optimizer state {key!r} is in a quantization map this version does not know"
            ) from error
        state[BLOCK_SCALES[key]] = block_again(values, spread, signed)
        state[key] = values.view(buffer.master.shape)
    return state


def _codes(reader: TensorReader, file: str, tensor: str, start: int, stop: int) -> torch.Tensor:
    if reader.dtype(file, tensor) != torch.uint8:
        raise CheckpointError(f"optimizer state {tensor!r} of {file} is not in 8-bit blocks like its neighbours")
    return reader.read(file, tensor, start, stop)
