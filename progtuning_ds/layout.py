"""Who owns which elements of which optimizer buffer.

Owns layouts as plain frozen values; imports the standard library only. The way from one layout to another is
planned in ``progtuning_ds.repartition``.

Two shapes of ownership exist in ZeRO (arXiv 1910.02054):

* *flat* (``deepspeed/runtime/zero/stage_1_and_2.py``, ``bf16_optimizer.py``): the parameters of a group are laid
  end to end in one buffer, padded to a multiple of ``alignment * world_size``, and rank r owns the r-th equal share;
* *sharded* (``deepspeed/runtime/zero/stage3.py``): every parameter is cut into ``world_size`` equal shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FLAT_ALIGNMENT = 2
"""Elements per rank a flat buffer is a multiple of (``nccl_start_alignment_factor`` in stage_1_and_2.py)."""


@dataclass(frozen=True, slots=True)
class Span:
    """``numel`` elements of ``param`` from ``start`` on, held by ``rank`` at ``offset`` of its share of ``buffer``."""

    param: str
    start: int
    numel: int
    rank: int
    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Spans of all buffers. ``partition_numel[b]`` is each rank's share of buffer b in elements, padding included."""

    world_size: int
    spans: tuple[Span, ...]
    partition_numel: tuple[int, ...]

    def __post_init__(self) -> None:
        for span in self.spans:
            if not 0 <= span.rank < self.world_size:
                raise ValueError(f"span.rank must be below world_size={self.world_size}, got {span}")
            if span.numel <= 0 or span.offset + span.numel > self.partition_numel[span.buffer]:
                raise ValueError(
                    f"span must lie inside its partition of {self.partition_numel[span.buffer]}, got {span}"
                )

    def owned(self, rank: int) -> Iterator[Span]:
        """Spans held by ``rank``, in buffer order."""
        return (span for span in self.spans if span.rank == rank)

    def owned_numel(self, rank: int) -> int:
        """Parameter elements held by ``rank``, padding not counted."""
        return sum(span.numel for span in self.owned(rank))


def padded_numel(numel: int, world_size: int, alignment: int = FLAT_ALIGNMENT) -> int:
    """Elements of a flat buffer that holds ``numel`` parameter elements: a multiple of ``alignment * world_size``."""
    unit = alignment * world_size
    return -(-numel // unit) * unit


def flat_offsets(numels: Sequence[int], param_alignment: int = 1) -> tuple[int, ...]:
    """Where each parameter starts in a flat buffer; ``param_alignment`` in elements (``parameter_alignment``)."""
    offsets, position = [], 0
    for numel in numels:
        position += -position % param_alignment
        offsets.append(position)
        position += numel
    return tuple(offsets)


def flat_layout(
    groups: Sequence[Sequence[tuple[str, int]]],
    world_size: int,
    *,
    alignment: int = FLAT_ALIGNMENT,
    param_alignment: int = 1,
) -> Layout:
    """Layout of ZeRO-1/2: each group is one flat buffer of ``(name, numel)`` parameters, cut into equal shares."""
    spans: list[Span] = []
    shares: list[int] = []
    for buffer, group in enumerate(groups):
        offsets = flat_offsets([numel for _, numel in group], param_alignment)
        end = offsets[-1] + group[-1][1] if group else 0
        share = padded_numel(end, world_size, alignment) // world_size
        shares.append(share)
        for (name, numel), first in zip(group, offsets, strict=True):
            spans.extend(_cut(name, numel, first, share, buffer))
    return Layout(world_size, tuple(spans), tuple(shares))


def _cut(name: str, numel: int, first: int, share: int, buffer: int) -> Iterator[Span]:
    position = first
    while position < first + numel:
        rank = position // share
        stop = min(first + numel, (rank + 1) * share)
        yield Span(name, position - first, stop - position, rank, buffer, position - rank * share)
        position = stop


def shard_numel(numel: int, world_size: int) -> int:
    """Elements of one rank's shard of a ZeRO-3 parameter, padding included (``partition_parameters.py``)."""
    return -(-numel // world_size)


def sharded_layout(groups: Sequence[Sequence[tuple[str, int]]], world_size: int) -> Layout:
    """Layout of ZeRO-3: buffer b of a rank holds that rank's shard of each parameter of sub-group b, end to end."""
    spans: list[Span] = []
    shares: list[int] = []
    for buffer, group in enumerate(groups):
        offset = 0
        for name, numel in group:
            shard = shard_numel(numel, world_size)
            for rank in range(world_size):
                own = min(shard, numel - rank * shard)
                if own > 0:
                    spans.append(Span(name, rank * shard, own, rank, buffer, offset))
            offset += shard
        shares.append(offset)
    return Layout(world_size, tuple(spans), tuple(shares))
