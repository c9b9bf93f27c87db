"""Executes repartition plans on tensors and ranks, in bounded chunks.

Owns all communication of optimizer state and the release of what it leaves behind. Imports torch, never DeepSpeed.

Moving one buffer needs its old and its new version. So that the two never exist side by side, the new version is
assembled outside the memory the old one occupies:

* state on an accelerator is assembled in host memory, the old buffer is released, and the result goes back;
* state in host memory is assembled in place, and pages of the old buffer are handed back to the operating system as
  soon as they have been read (``madvise(MADV_DONTNEED)``; Linux, unpinned memory).

Either way the extra peak is the chunk in flight, not the buffer.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from progtuning_ds.layout import Layout
from progtuning_ds.repartition import Move, RepartitionPlan, merge_moves, split_move

DEFAULT_CHUNK_BYTES = 64 * 2**20
_COPY_BYTES = 4 * 2**20
_RELEASE_FLOOR_BYTES = 64 * 2**10
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Ranks:
    """The process group that shares the buffers. ``group`` None means a single process."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None

    def global_rank(self, rank: int) -> int:
        """Rank in the default group of ``rank`` in this one; point-to-point calls want the former."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def carry(
    plan: RepartitionPlan,
    old: dict[int, torch.Tensor],
    new_layout: Layout,
    ranks: Ranks,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> dict[int, torch.Tensor]:
    """Move one kind of state (masters, exp_avg, ...) from its old buffers to new ones; collective.

    Args:
        plan: the same on all ranks.
        old: this rank's share of each old buffer that ``plan`` reads, 1-D and of one dtype and device. Consumed:
            the storage of every tensor is released, their contents are undefined afterwards.
        new_layout: gives the size of each new share; only buffers that ``plan`` writes are made.
        ranks: who takes part.
        chunk_bytes: limit of what is in flight on a rank, sent and received together.

    Returns:
        This rank's share of each new buffer, padding and fresh spans zero, on the device of the old ones.
    """
    assert new_layout.world_size == ranks.world_size, "a layout is executed by the ranks it was made for"
    sample = next(iter(old.values()))
    staged = {
        buffer: torch.empty(new_layout.partition_numel[buffer], dtype=sample.dtype)
        for buffer in sorted({move.dst_buffer for move in plan.moves})
    }
    for buffer, tensor in staged.items():
        arriving = [m for m in plan.moves if m.dst_buffer == buffer and m.dst_rank == ranks.rank]
        zero_gaps(tensor, [(move.dst_offset, move.numel) for move in arriving])
    for span in plan.dropped:
        if span.rank == ranks.rank and span.buffer in old:
            release_pages(old[span.buffer].detach().narrow(0, span.offset, span.numel))
    limit = max(1, chunk_bytes // sample.element_size() // 2)
    for round_ in _rounds(plan.moves, limit, ranks.world_size):
        _exchange(round_, old, staged, ranks)
    for tensor in old.values():
        release_storage(tensor)
    if sample.device.type == "cpu":
        return staged
    # One at a time, so that host copies go as device copies come.
    return {buffer: staged.pop(buffer).to(sample.device) for buffer in list(staged)}


def _rounds(moves: Sequence[Move], limit: int, world_size: int) -> Iterator[list[Move]]:
    """Cut ``moves`` into rounds in which no rank sends or receives more than ``limit`` elements."""
    sent, received = [0] * world_size, [0] * world_size
    round_: list[Move] = []
    for move in merge_moves(moves):
        for piece in split_move(move, limit):
            load = piece.numel if piece.crosses_ranks else 0
            if round_ and (sent[piece.src_rank] + load > limit or received[piece.dst_rank] + load > limit):
                yield round_
                round_, sent, received = [], [0] * world_size, [0] * world_size
            round_.append(piece)
            sent[piece.src_rank] += load
            received[piece.dst_rank] += load
    if round_:
        yield round_


def _exchange(round_: list[Move], old: dict[int, torch.Tensor], staged: dict[int, torch.Tensor], ranks: Ranks) -> None:
    operations: list[dist.P2POp] = []
    arrivals: list[tuple[Move, torch.Tensor]] = []
    for move in round_:
        if not move.crosses_ranks:
            if move.src_rank == ranks.rank:
                drain(_source(move, old), _target(move, staged))
        elif move.src_rank == ranks.rank:
            peer = ranks.global_rank(move.dst_rank)
            operations.append(dist.P2POp(dist.isend, _source(move, old).contiguous(), peer, ranks.group))
        elif move.dst_rank == ranks.rank:
            template = next(iter(old.values()))
            arrival = torch.empty(move.numel, dtype=template.dtype, device=template.device)
            arrivals.append((move, arrival))
            peer = ranks.global_rank(move.src_rank)
            operations.append(dist.P2POp(dist.irecv, arrival, peer, ranks.group))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for move, arrival in arrivals:
        _target(move, staged).copy_(arrival)
    for move in round_:
        if move.src_rank == ranks.rank and move.crosses_ranks:
            release_pages(_source(move, old))


def _source(move: Move, old: dict[int, torch.Tensor]) -> torch.Tensor:
    return old[move.src_buffer].detach().narrow(0, move.src_offset, move.numel)


def _target(move: Move, staged: dict[int, torch.Tensor]) -> torch.Tensor:
    return staged[move.dst_buffer].narrow(0, move.dst_offset, move.numel)


def split_buffer(
    buffer: torch.Tensor, pieces: Sequence[Sequence[tuple[int, int]]], sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Take a buffer apart into new buffers without holding both; local.

    Args:
        buffer: 1-D tensor. Consumed, as in ``carry``.
        pieces: for each new buffer the ``(start, numel)`` ranges of ``buffer`` it holds, end to end.
        sizes: elements of each new buffer; what the pieces do not fill is zero.

    Returns:
        The new buffers, on the device of the old one.
    """
    staged = [torch.empty(size, dtype=buffer.dtype) for size in sizes]
    for target, ranges in zip(staged, pieces, strict=True):
        zero_gaps(target, [(0, sum(numel for _, numel in ranges))])
        offset = 0
        for start, numel in ranges:
            drain(buffer.narrow(0, start, numel), target.narrow(0, offset, numel))
            offset += numel
    device = buffer.device
    release_storage(buffer)
    if device.type == "cpu":
        return staged
    return [staged.pop(0).to(device) for _ in range(len(sizes))]


def zero_gaps(tensor: torch.Tensor, filled: Iterable[tuple[int, int]]) -> None:
    """Zero what lies between the ``(start, numel)`` ranges that somebody else fills.

    ``torch.zeros`` would touch every page of the new buffer while the old one is still there.
    """
    position = 0
    for start, numel in sorted(filled):
        tensor[position:start].zero_()
        position = start + numel
    tensor[position:].zero_()


def release_storage(tensor: torch.Tensor) -> None:
    """Give back the memory behind ``tensor`` now, whoever still holds a view of it.

    Views that are left over must not be read again. Memory torch does not own (pinned by DeepSpeed's native backend)
    cannot be resized and goes with its last reference.
    """
    storage = tensor.untyped_storage()
    if storage.resizable():
        storage.resize_(0)


def drain(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy ``source`` to ``target`` (1-D, contiguous, same size), releasing its pages as they are read.

    ``source`` is undefined afterwards.
    """
    step = max(1, _COPY_BYTES // source.element_size())
    for start in range(0, source.numel(), step):
        piece = source[start : start + step]
        target[start : start + step].copy_(piece)
        release_pages(piece)


def release_pages(tensor: torch.Tensor) -> None:
    """Hand the memory pages that lie wholly inside a 1-D contiguous ``tensor`` back to the operating system.

    They read as zero afterwards. Does nothing for accelerator or pinned memory, for small tensors, and outside Linux:
    the memory is then released with the whole buffer.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < _RELEASE_FLOOR_BYTES or sys.platform != "linux" or tensor.is_pinned():
        return
    # A page at the edge also holds the neighbour's elements and stays.
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(_MADV_DONTNEED))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
