"""The work of a step: active pieces, their gradients, and tables of them in device memory. Imports torch alone.

The tables keep their place and size for the life of the work list, so that a captured CUDA graph goes on working
after a mask change: only what is in them changes, the number of tiles included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from progtuning_kernels.buffers import GRADIENT_DTYPES, STATE_BLOCK, FlatBuffer
from progtuning_kernels.control import copy_without_waiting
from progtuning_kernels.segments import Piece, check_segments, num_tiles, pieces_of

Gradients = torch.Tensor | Sequence[torch.Tensor | None]
"""Of one buffer: a flat tensor of its size, or one tensor per segment (of any shape; None where it is frozen)."""

PIECE_COLUMNS = 12
"""Columns of the table of pieces; the order is that of `_row`. 12 x 8 bytes keep rows 32-byte aligned."""
FIRST_COLUMN, END_COLUMN = 6, 7


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernels cut their work. The defaults are what was compiled and inspected; a benchmark may vary them."""

    tile: int = 4096
    """Elements of a tile, the unit that a program takes from the work list; a multiple of ``block``."""
    block: int = 1024
    """Elements that a program holds in registers at a time; a multiple of 256."""
    warps: int = 4
    norm_programs: int = 1024
    """Grid of the norm: constant, so that sums do not depend on the device. A power of two."""
    persistent_programs: int = 0
    """Grid of the update: 0 launches one program per tile, which a CUDA graph with changing masks cannot have."""

    def __post_init__(self) -> None:
        if self.block % STATE_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"block must be a power of two and a multiple of {STATE_BLOCK}, got {self.block}")
        if self.tile % self.block or self.tile < self.block:
            raise ValueError(f"tile must be a multiple of block={self.block}, got {self.tile}")
        if self.norm_programs < 1 or self.norm_programs & (self.norm_programs - 1):
            raise ValueError(f"norm_programs must be a power of two, got {self.norm_programs}")


class ActivePiece(NamedTuple):
    """Slices of one active piece, for an implementation in plain PyTorch."""

    buffer: FlatBuffer
    start: int
    stop: int
    group: int
    gradient: torch.Tensor
    """1-D [stop - start], bf16, fp16 or fp32, still scaled."""
    index: int
    """Number of element ``start`` among the elements of all buffers."""


class WorkList:
    """Which elements of which buffers a step updates, and where their gradients are."""

    def __init__(
        self,
        buffers: Sequence[FlatBuffer],
        num_groups: int,
        *,
        gradients: str = "flat",
        launch: Launch | None = None,
    ) -> None:
        """Check the buffers and start with the mask that their segments carry.

        Args:
            buffers: of one variant and device; e.g. one per ZeRO-1/2 group, or one per ZeRO-3 sub-group.
            num_groups: segments name groups below this.
            gradients: "flat" (one tensor per buffer) or "segments" (one tensor per segment).
            launch: how to cut the work.

        Raises:
            ValueError: buffers that differ in variant, wrong segments, another word for ``gradients``.
        """
        if gradients not in ("flat", "segments"):
            raise ValueError(f'gradients must be "flat" or "segments", got {gradients!r}')
        if not buffers:
            raise ValueError("buffers must hold at least one buffer, got none")
        for index, buffer in enumerate(buffers):
            check_segments(buffer.segments, buffer.numel, num_groups, f"buffers[{index}].segments")
            if buffer.variant != buffers[0].variant:
                raise ValueError(
                    f"buffers[{index}] must be like buffers[0], {buffers[0].variant}, got {buffer.variant}"
                )
        self.buffers = tuple(buffers)
        self.num_groups = num_groups
        self.flat_gradients = gradients == "flat"
        self.launch = launch or Launch()
        self.device = buffers[0].device
        self.pieces: tuple[Piece, ...] = ()
        self.num_tiles = 0
        self.gradient_dtype = torch.float32
        self.num_whole_tiles = 0
        self._first_index = (0, *accumulate(buffer.numel for buffer in buffers))
        self._gradients: tuple[torch.Tensor, ...] | None = None
        self._addresses: list[int] = []
        self._rows: list[list[int]] = []
        self._ready: list[bool] = []
        self._aligned: list[bool] | None = None
        rows = sum(len(buffer.segments) for buffer in buffers)
        tile = self.launch.tile
        tiles = sum(num_tiles(s.start, s.stop, tile) for buffer in buffers for s in buffer.segments)

        self.piece_table = torch.zeros(max(rows, 1), PIECE_COLUMNS, dtype=torch.int64, device=self.device)
        """One row per piece; see `_row`."""
        self.address_table = torch.zeros(max(rows, 1), dtype=torch.int64, device=self.device)
        """Per piece, where the gradient of its first tile's first element is, or would be."""
        self.tile_table = torch.zeros(max(tiles, 1), 2, dtype=torch.int32, device=self.device)
        """One row per tile: its piece, and its number on the tile grid counted from the piece's first. First those
        that are whole and well aligned, then the others: ends of pieces, and pieces that lie at odd addresses."""
        self.tile_counts = torch.zeros(2, dtype=torch.int32, device=self.device)
        """How many rows of ``tile_table`` are of the first kind, and how many there are."""
        self.set_active([[segment.active for segment in buffer.segments] for buffer in buffers])

    def set_active(self, active: Sequence[Sequence[bool]]) -> None:
        """Choose what trains from the next step on: one flag per segment, per buffer. Gradients must be bound anew."""
        if len(active) != len(self.buffers):
            raise ValueError(f"active must have one list for each of {len(self.buffers)} buffers, got {len(active)}")
        pieces: list[Piece] = []
        for index, (buffer, flags) in enumerate(zip(self.buffers, active, strict=True)):
            if len(flags) != len(buffer.segments):
                raise ValueError(f"active[{index}] must have {len(buffer.segments)} flags, got {len(flags)}")
            pieces += pieces_of(index, buffer.segments, flags, self.flat_gradients)
        self.pieces = tuple(pieces)
        self._rows = [self._row(piece) for piece in self.pieces]
        self._ready = [self._well_aligned(row) for row in self._rows]
        self._gradients = None
        self._addresses = []
        self._aligned = None  # the tables are filled when gradients are bound: their addresses have a say in it

    @property
    def active_groups(self) -> list[bool]:
        """Per group, whether a piece of it trains here."""
        present = {piece.group for piece in self.pieces}
        return [group in present for group in range(self.num_groups)]

    @property
    def active_numel(self) -> int:
        """Elements that a step updates here."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def bytes_moved(self) -> int:
        """Bytes that a step of the fused kernels reads and writes: every gradient twice, state once; tables aside.

        30 per active element with bf16 gradients and weights and fp32 masters and state.
        """
        per_update = self.buffers[0].bytes_per_update
        return round(self.active_numel * (2 * self.gradient_dtype.itemsize + per_update))

    def bind(self, gradients: Sequence[Gradients]) -> None:
        """Say where the gradients of the next step are; they stay untouched and must live until the step has run.

        Copies addresses to the device only if some changed, and does not wait.

        Args:
            gradients: per buffer; of one dtype (bf16, fp16 or fp32), contiguous, on the buffers' device.

        Raises:
            ValueError: a gradient that is missing or of a wrong size, dtype, device or layout.
        """
        if len(gradients) != len(self.buffers):
            raise ValueError(
                f"gradients must have an entry for each of {len(self.buffers)} buffers, got {len(gradients)}"
            )
        bound = tuple(self._gradient(gradients[piece.buffer], piece) for piece in self.pieces)
        dtypes = {gradient.dtype for gradient in bound}
        if len(dtypes) > 1:
            raise ValueError(f"gradients must be of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        self._gradients = bound
        self.gradient_dtype = dtypes.pop() if dtypes else torch.float32
        addresses = [
            gradient.data_ptr() - (piece.start % self.launch.tile) * gradient.element_size()
            for gradient, piece in zip(bound, self.pieces, strict=True)
        ]
        if addresses == self._addresses and self._aligned is not None:
            return
        self._addresses = addresses
        wide = 4 * self.gradient_dtype.itemsize
        aligned = [ready and address % wide == 0 for ready, address in zip(self._ready, addresses, strict=True)]
        if aligned != self._aligned:
            self._aligned = aligned
            self._fill_tables(aligned)
        copy_without_waiting(self.address_table[: len(addresses)], torch.tensor(addresses, dtype=torch.int64))

    def release(self) -> None:
        """Forget the gradients, once the step that reads them has been launched: memory is freed in stream order."""
        self._gradients = None

    def active_pieces(self) -> Iterator[ActivePiece]:
        """Yield the pieces with their gradients.

        Raises:
            RuntimeError: no gradients are bound.
        """
        if self._gradients is None:
            raise RuntimeError("bind gradients before a step: none are bound since the last step or mask change")
        for piece, gradient in zip(self.pieces, self._gradients, strict=True):
            index = self._first_index[piece.buffer] + piece.start
            yield ActivePiece(self.buffers[piece.buffer], piece.start, piece.stop, piece.group, gradient, index)

    def _gradient(self, given: Gradients, piece: Piece) -> torch.Tensor:
        buffer = self.buffers[piece.buffer]
        name = f"gradients[{piece.buffer}]"
        tensor, numel = given, buffer.numel
        if not self.flat_gradients:
            if isinstance(given, torch.Tensor) or len(given) != len(buffer.segments):
                raise ValueError(f"{name} must be a sequence of {len(buffer.segments)} tensors, one per segment")
            name, tensor, numel = f"{name}[{piece.segment}]", given[piece.segment], piece.stop - piece.start
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, because it trains; got {tensor!r:.50}")
        if tensor.numel() != numel or not tensor.is_contiguous() or tensor.device != self.device:
            shape = f"shape {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device}"
            raise ValueError(f"{name} must be contiguous, of {numel} elements, on {self.device}; got {shape}")
        if tensor.dtype not in GRADIENT_DTYPES:
            raise ValueError(f"{name} must be {', '.join(map(str, GRADIENT_DTYPES))}, got {tensor.dtype}")
        flat = tensor.detach().view(-1)
        return flat[piece.start : piece.stop] if self.flat_gradients else flat

    def _fill_tables(self, aligned: list[bool]) -> None:
        tile = self.launch.tile
        counts = torch.tensor([num_tiles(piece.start, piece.stop, tile) for piece in self.pieces], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        cell = torch.arange(len(owner)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        table = torch.tensor(self._rows, dtype=torch.int64).view(-1, PIECE_COLUMNS)
        first, end = table[owner, FIRST_COLUMN], table[owner, END_COLUMN]
        whole = (cell * tile >= first) & ((cell + 1) * tile <= end) & torch.tensor(aligned, dtype=torch.bool)[owner]
        tiles = torch.stack([owner, cell], dim=1).to(torch.int32)
        self.num_whole_tiles, self.num_tiles = int(whole.sum()), len(tiles)
        copy_without_waiting(self.tile_counts, torch.tensor([self.num_whole_tiles, self.num_tiles], dtype=torch.int32))
        copy_without_waiting(self.tile_table[: len(tiles)], torch.cat([tiles[whole], tiles[~whole]]))
        copy_without_waiting(self.piece_table[: len(table)], table)

    def _well_aligned(self, row: list[int]) -> bool:
        """Whether groups of four elements can be read and written in one go, in every tensor of a piece's buffer."""
        buffer = self.buffers[0]
        kept = 4 if buffer.precision == "master" else 2
        sizes = (kept, 2, buffer.exp_avg.element_size(), buffer.exp_avg_sq.element_size())
        return all(address % (4 * size) == 0 for address, size in zip(row, sizes, strict=False))

    def _row(self, piece: Piece) -> list[int]:
        """A row of the table of pieces, relative to its first tile, which may begin before the piece does."""
        buffer = self.buffers[piece.buffer]
        origin = piece.start - piece.start % self.launch.tile

        def address(tensor: torch.Tensor | None, per: int = 1) -> int:
            return 0 if tensor is None else tensor.data_ptr() + origin // per * tensor.element_size()

        kept = buffer.master if buffer.remainder is None else buffer.remainder
        row = [
            address(kept),
            address(buffer.weight),
            address(buffer.exp_avg),
            address(buffer.exp_avg_sq),
            address(buffer.absmax, STATE_BLOCK),
            address(buffer.absmax_sq, STATE_BLOCK),
            piece.start - origin,
            piece.stop - origin,
            piece.group,
            self._first_index[piece.buffer] + origin,
        ]
        return row + [0] * (PIECE_COLUMNS - len(row))
