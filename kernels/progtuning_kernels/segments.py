"""Which stretches of a flat buffer train, and the tiles that cover them. Standard library only.

A mask is a table of segments. It is turned into pieces (maximal active stretches) once per stage, and pieces are cut
into tiles on a fixed grid. What is frozen, and padding, which no segment covers, is in no tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a flat buffer that freezes as one, in elements."""

    start: int
    length: int
    group: int
    """Index of the group whose learning rate, betas, eps and weight decay hold here."""
    active: bool = True
    """Whether it trains; a frozen segment is neither read nor written."""

    @property
    def stop(self) -> int:
        """First element after the segment."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Piece:
    """An active stretch of one buffer, with one group and one gradient tensor."""

    buffer: int
    start: int
    stop: int
    group: int
    segment: int
    """Position of the (first) segment in its buffer's table."""


def check_segments(segments: Sequence[Segment], size: int, num_groups: int, name: str = "segments") -> None:
    """Raise `ValueError` unless `segments` are in order, disjoint, inside `size` elements and of known groups."""
    end = 0
    for index, segment in enumerate(segments):
        what = f"{name}[{index}]"
        if segment.length < 1:
            raise ValueError(f"{what}.length must be at least 1, got {segment.length}")
        if segment.start < end:
            raise ValueError(f"{what}.start must be at least {end}, where the previous ends, got {segment.start}")
        if segment.stop > size:
            raise ValueError(f"{what} must end within the buffer's {size} elements, got end {segment.stop}")
        if not 0 <= segment.group < num_groups:
            raise ValueError(f"{what}.group must be in 0..{num_groups - 1}, got {segment.group}")
        end = segment.stop


def pieces_of(buffer: int, segments: Sequence[Segment], active: Sequence[bool], merge: bool) -> Iterator[Piece]:
    """Yield the active stretches of one buffer in order.

    Args:
        buffer: index of the buffer, kept in every piece.
        segments: checked by `check_segments`.
        active: one flag per segment; those in the segments are not looked at.
        merge: whether neighbours of one group become one piece, as a gradient that is flat too allows.
    """
    piece: Piece | None = None
    for index, (segment, trains) in enumerate(zip(segments, active, strict=True)):
        if not trains:
            continue
        joins = merge and piece is not None and piece.stop == segment.start and piece.group == segment.group
        if piece is not None and joins:
            piece = Piece(buffer, piece.start, segment.stop, piece.group, piece.segment)
            continue
        if piece is not None:
            yield piece
        piece = Piece(buffer, segment.start, segment.stop, segment.group, index)
    if piece is not None:
        yield piece


def num_tiles(start: int, stop: int, tile: int) -> int:
    """Tiles of `tile` elements, on a grid that begins with the buffer, that elements `start` to `stop` touch."""
    return (stop - 1) // tile - start // tile + 1
