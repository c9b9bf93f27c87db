"""Tiles cover what trains, once each, and nothing else; wrong buffers, masks and gradients are refused by name."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from progtuning_kernels import FlatBuffer, Launch, Segment, WorkList
from progtuning_kernels.worklist import END_COLUMN, FIRST_COLUMN

TILE = 512
LAUNCH = Launch(tile=TILE, block=256, norm_programs=2)


def buffer(segments: tuple[Segment, ...], numel: int, **changes: object) -> FlatBuffer:
    fields = {
        "segments": segments,
        "exp_avg": torch.zeros(numel),
        "exp_avg_sq": torch.zeros(numel),
        "weight": torch.zeros(numel, dtype=torch.bfloat16),
        "master": torch.zeros(numel),
    }
    return FlatBuffer(**(fields | changes))


@st.composite
def masked_buffers(draw: st.DrawFn) -> tuple[list[tuple[tuple[Segment, ...], int]], list[list[bool]]]:
    layouts, masks = [], []
    for _ in range(draw(st.integers(1, 3))):
        segments, end = [], 0
        for _ in range(draw(st.integers(1, 6))):
            start = end + draw(st.sampled_from([0, 0, 0, 1, 7, TILE]))
            length = draw(st.sampled_from([1, 2, 255, TILE - 1, TILE, TILE + 1, 3 * TILE]))
            segments.append(Segment(start, length, draw(st.integers(0, 2))))
            end = start + length
        layouts.append((tuple(segments), end + draw(st.integers(0, 5))))
        masks.append([draw(st.booleans()) for _ in segments])
    return layouts, masks


def elements_of_tiles(work: WorkList) -> Counter[tuple[int, int, int]]:
    """Decode the device tables as a kernel does: (buffer, element, group) of everything that tiles cover."""
    masters = {b.master.data_ptr(): index for index, b in enumerate(work.buffers)}
    covered: Counter[tuple[int, int, int]] = Counter()
    whole, total = work.tile_counts.tolist()
    for number, (piece, cell) in enumerate(work.tile_table[:total].tolist()):
        row = work.piece_table[piece].tolist()
        first, end = max(row[FIRST_COLUMN], cell * TILE), min(row[END_COLUMN], (cell + 1) * TILE)
        assert first < end
        assert (number < whole) <= (end - first == TILE)
        index = max(masters[p] for p in masters if p <= row[0] and row[0] < p + 4 * work.buffers[masters[p]].numel)
        origin = (row[0] - work.buffers[index].master.data_ptr()) // 4
        covered.update((index, origin + element, row[8]) for element in range(first, end))
    return covered


def zeros(work: WorkList) -> list:
    if work.flat_gradients:
        return [torch.zeros(b.numel) for b in work.buffers]
    return [[torch.zeros(s.length) for s in b.segments] for b in work.buffers]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(masked_buffers(), st.sampled_from(["flat", "segments"]))
def test_tiles_cover_every_active_element_once_and_no_other(problem, form):
    layouts, masks = problem
    work = WorkList([buffer(*layout) for layout in layouts], 3, gradients=form, launch=LAUNCH)
    capacity = len(work.tile_table)
    work.set_active(masks)
    work.bind(zeros(work))
    expected = Counter(
        (index, element, segment.group)
        for index, ((segments, _), flags) in enumerate(zip(layouts, masks, strict=True))
        for segment, trains in zip(segments, flags, strict=True)
        if trains
        for element in range(segment.start, segment.stop)
    )
    assert elements_of_tiles(work) == expected
    assert work.active_numel == expected.total()
    assert work.num_tiles <= capacity


def test_what_is_frozen_is_in_no_tile():
    segments = (Segment(0, 8 * TILE, 0), Segment(8 * TILE, 2 * TILE, 0))
    work = WorkList([buffer(segments, 10 * TILE)], 1, launch=LAUNCH)
    work.bind(zeros(work))
    assert work.num_tiles == 10
    work.set_active([[False, True]])
    work.bind(zeros(work))
    assert work.num_tiles == 2


def test_neighbours_of_one_group_share_tiles_where_the_gradient_is_flat():
    segments = tuple(Segment(TILE // 4 * index, TILE // 4, 0) for index in range(8))
    for form, tiles in (("flat", 2), ("segments", 8)):
        work = WorkList([buffer(segments, 2 * TILE)], 1, gradients=form, launch=LAUNCH)
        work.bind(zeros(work))
        assert work.num_tiles == tiles


@pytest.mark.parametrize(("shift", "whole"), [(0, 3), (1, 0), (4, 3)])
def test_tiles_are_whole_only_where_every_address_allows_wide_accesses(shift, whole):
    work = WorkList([buffer((Segment(0, 3 * TILE + 5, 0),), 3 * TILE + 5)], 1, launch=LAUNCH)
    gradient = torch.zeros(3 * TILE + 5 + shift, dtype=torch.bfloat16)[shift:]
    work.bind([gradient])
    assert (work.num_whole_tiles, work.num_tiles) == (whole, 4)
    assert work.tile_counts.tolist() == [whole, 4]


def test_rebinding_moves_addresses_and_alignment():
    work = WorkList([buffer((Segment(0, TILE, 0),), TILE)], 1, launch=LAUNCH)
    gradients = torch.zeros(2 * TILE, dtype=torch.bfloat16)
    for start, whole in ((0, 1), (3, 0), (TILE, 1)):
        work.bind([gradients[start : start + TILE]])
        assert work.num_whole_tiles == whole
        assert work.address_table[0].item() == gradients.data_ptr() + 2 * start


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_wrong_segments_are_refused_by_name():
    with refused(r"buffers\[0\].segments\[1\].start must be at least 5, .* got 4"):
        WorkList([buffer((Segment(0, 5, 0), Segment(4, 2, 0)), 9)], 1)
    with refused(r"segments\[0\] must end within the buffer's 9 elements, got end 10"):
        WorkList([buffer((Segment(0, 10, 0),), 9)], 1)
    with refused(r"segments\[0\].length must be at least 1, got 0"):
        WorkList([buffer((Segment(0, 0, 0),), 9)], 1)
    with refused(r"segments\[0\].group must be in 0..1, got 2"):
        WorkList([buffer((Segment(0, 1, 2),), 9)], 2)
    with refused("segments.0..start must be a multiple of 256 with 8-bit state, got 3"):
        codes = {name: torch.zeros(9, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")}
        buffer((Segment(3, 1, 0),), 9, **codes, absmax=torch.zeros(1), absmax_sq=torch.zeros(1))


def test_wrong_buffers_are_refused_by_name():
    segments = (Segment(0, 9, 0),)
    with refused("master must be torch.float32, got torch.bfloat16"):
        buffer(segments, 9, master=torch.zeros(9, dtype=torch.bfloat16))
    with refused(r"exp_avg_sq must be contiguous with shape \(9,\), got \(8,\)"):
        buffer(segments, 9, exp_avg_sq=torch.zeros(8))
    with refused("weight must be torch.bfloat16 where there is no master, got torch.float16"):
        buffer(segments, 9, master=None, weight=torch.zeros(9, dtype=torch.float16))
    with refused("remainder must be None where there is a master"):
        buffer(segments, 9, remainder=torch.zeros(9, dtype=torch.int16))
    with refused("absmax must be given with 8-bit state and only then"):
        buffer(segments, 9, absmax=torch.zeros(1))
    with refused(r"buffers\[1\] must be like buffers\[0\]"):
        WorkList([buffer(segments, 9), buffer(segments, 9, weight=None)], 1)
    with refused('gradients must be "flat" or "segments"'):
        WorkList([buffer(segments, 9)], 1, gradients="tensors")


def test_wrong_gradients_are_refused_by_name():
    segments = (Segment(0, 4, 0), Segment(4, 5, 0))
    flat = WorkList([buffer(segments, 9)], 1)
    with refused(r"gradients must have an entry for each of 1 buffers, got 2"):
        flat.bind([torch.zeros(9), torch.zeros(9)])
    with refused(r"gradients\[0\] must be contiguous, of 9 elements, on cpu; got shape \(8,\)"):
        flat.bind([torch.zeros(8)])
    with refused(r"gradients\[0\] must be .* got torch.float64"):
        flat.bind([torch.zeros(9, dtype=torch.float64)])
    parts = WorkList([buffer(segments, 9)], 1, gradients="segments")
    with refused(r"gradients\[0\] must be a sequence of 2 tensors"):
        parts.bind([torch.zeros(9)])
    with refused(r"gradients\[0\]\[1\] must be a tensor, because it trains; got None"):
        parts.bind([[torch.zeros(4), None]])
    with refused("gradients must be of one dtype, got torch.bfloat16, torch.float32"):
        parts.bind([[torch.zeros(4), torch.zeros(5, dtype=torch.bfloat16)]])
    parts.set_active([[True, False]])
    parts.bind([[torch.zeros(2, 2), None]])  # any shape; None where frozen


def test_wrong_masks_are_refused():
    work = WorkList([buffer((Segment(0, 4, 0), Segment(4, 5, 0)), 9)], 1)
    with refused(r"active\[0\] must have 2 flags, got 1"):
        work.set_active([[True]])
    with refused("active must have one list for each of 1 buffers, got 2"):
        work.set_active([[True, True], [True]])


def test_a_step_without_gradients_is_refused():
    work = WorkList([buffer((Segment(0, 9, 0),), 9)], 1)
    with pytest.raises(RuntimeError, match="bind gradients before a step"):
        list(work.active_pieces())
    work.bind([torch.zeros(9)])
    assert len(list(work.active_pieces())) == 1
    work.set_active([[True]])
    with pytest.raises(RuntimeError, match="bind gradients before a step"):
        list(work.active_pieces())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 128}, "block must be a power of two and a multiple of 256, got 128"),
        ({"tile": 1500}, "tile must be a multiple of block=1024, got 1500"),
        ({"norm_programs": 1000}, "norm_programs must be a power of two, got 1000"),
    ],
)
def test_wrong_launches_are_refused(arguments, message):
    with refused(message):
        Launch(**arguments)
