"""State is carried to the bit, on real ranks and in one process, and what it leaves behind is released."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from progtuning_ds.layout import flat_layout
from progtuning_ds.repartition import plan_repartition
from progtuning_ds.transfer import Ranks, carry, release_pages, split_buffer

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are released with madvise, on Linux only")

OLD = [[("a", 1000), ("b", 333), ("c", 1), ("d", 777)], [("e", 2048)]]
NEW = [[("d", 777), ("e", 2048), ("n", 10)], [("b", 333)]]


def _values(name: str, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(ord(name)))


def _share(layout, groups, rank):
    """What ``rank`` holds of each buffer if every parameter of ``groups`` holds ``_values`` of its name, others 0."""
    values = {name: _values(name, numel) for group in groups for name, numel in group}
    buffers = {b: torch.zeros(n) for b, n in enumerate(layout.partition_numel)}
    for span in layout.owned(rank):
        if span.param not in values:
            continue
        piece = values[span.param][span.start : span.start + span.numel]
        buffers[span.buffer][span.offset : span.offset + span.numel] = piece
    return buffers


def carry_on_ranks(world_size: int, rank: int, chunk_bytes: int) -> bool:
    """Runs on every rank: carry OLD to NEW and compare with what NEW should hold."""
    old, new = flat_layout(OLD, world_size), flat_layout(NEW, world_size)
    plan = plan_repartition(old, new)
    buffers = _share(old, OLD, rank)
    group = None
    if world_size > 1:
        group = torch.distributed.group.WORLD
    result = carry(plan, buffers, new, Ranks(rank, world_size, group), chunk_bytes=chunk_bytes)
    wanted = _share(new, [[item for item in g if item[0] != "n"] for g in NEW], rank)
    assert all(buffer.untyped_storage().nbytes() == 0 for buffer in buffers.values()), "old buffers must be released"
    return all(torch.equal(result[b], wanted[b]) for b in result) and set(result) == {0, 1}


def on_a_rank(chunk_bytes: int) -> bool:
    return carry_on_ranks(torch.distributed.get_world_size(), torch.distributed.get_rank(), chunk_bytes)


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 256, 8])
def test_one_process_carries_every_element(chunk_bytes):
    assert carry_on_ranks(1, 0, chunk_bytes)


@pytest.mark.parametrize(("world_size", "chunk_bytes"), [(2, 64 * 2**20), (2, 100), (3, 4096)])
def test_ranks_carry_every_element(ranks, world_size, chunk_bytes):
    assert all(ranks(world_size).run(on_a_rank, chunk_bytes=chunk_bytes))


def test_splitting_a_buffer_keeps_its_pieces_and_releases_it():
    buffer = _values("x", 100)
    copy = buffer.clone()
    first, second = split_buffer(buffer, [[(10, 5), (50, 10)], [(0, 3)]], [16, 3])
    assert torch.equal(first, torch.cat([copy[10:15], copy[50:60], torch.zeros(1)]))
    assert torch.equal(second, copy[:3])
    assert buffer.untyped_storage().nbytes() == 0


@linux
def test_taking_a_large_buffer_apart_needs_no_second_one():
    numel = 64 * 2**20  # 256 MiB
    buffer = torch.ones(numel)
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    (kept,) = split_buffer(buffer, [[(numel // 4, numel // 4 * 3)]], [numel // 4 * 3])
    extra = _resident("VmHWM") - before
    assert extra < 24 * 2**20, f"{extra / 2**20:.0f} MiB beside a buffer of 256 MiB"
    assert bool((kept == 1).all())
    assert _resident() < before - 48 * 2**20, "the quarter that left must be given back"


def _resident(key: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@linux
def test_releasing_pages_spares_the_neighbours():
    buffer = torch.arange(3 * 2**20, dtype=torch.float32)
    first, last = 2**20 + 5, 2 * 2**20 - 7
    release_pages(buffer[first:last])
    assert torch.equal(buffer[:first], torch.arange(first, dtype=torch.float32))
    assert torch.equal(buffer[last:], torch.arange(last, 3 * 2**20, dtype=torch.float32))
    assert not bool(buffer[first + 1024 : last - 1024].any()), "pages inside must be gone"
