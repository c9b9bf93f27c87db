"""Whatever layout wrote a parameter and whatever layout wants it: the slices are its elements, each once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning_ds.checkpoint.fragments import read_fragments
from progtuning_ds.errors import CheckpointError
from progtuning_ds.layout import Layout, flat_layout, sharded_layout

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
worlds = st.integers(1, 5)


def layouts(numels: list[int], world_size: int, sharded: bool) -> Layout:
    named = [(f"p{index}", numel) for index, numel in enumerate(numels)]
    half = (len(named) + 1) // 2
    groups = [group for group in (named[half:], named[:half]) if group]
    return (sharded_layout if sharded else flat_layout)(groups, world_size)


def described(layout: Layout) -> tuple[list[tuple[str, dict]], dict[tuple[str, str], list[tuple[str, int] | None]]]:
    """The description of each rank as a save writes it, and what is in its tensors: (parameter, element)."""
    files, contents = [], {}
    for rank in range(layout.world_size):
        buffers = []
        for buffer, share in enumerate(layout.partition_numel):
            spans = [span for span in layout.owned(rank) if span.buffer == buffer]
            held: list[tuple[str, int] | None] = [None] * share
            for span in spans:
                held[span.offset : span.offset + span.numel] = [(span.param, span.start + i) for i in range(span.numel)]
            contents[f"{rank}", f"b{buffer}"] = held
            plain = [[span.param, span.start, span.numel, span.offset] for span in spans]
            buffers.append({"spans": plain, "kinds": {"master": f"b{buffer}"}})
        files.append((f"{rank}", {"weights": [], "buffers": buffers}))
    return files, contents


@given(numels=sizes, old=worlds, new=worlds, was_sharded=st.booleans(), is_sharded=st.booleans())
def test_any_layout_can_be_read_from_any_other(
    numels: list[int], old: int, new: int, was_sharded: bool, is_sharded: bool
) -> None:
    files, contents = described(layouts(numels, old, was_sharded))
    fragments = read_fragments(files)
    for span in layouts(numels, new, is_sharded).spans:
        got: list[object] = [None] * span.numel
        for piece in fragments.slices("master", span.param, span.start, span.numel):
            read = contents[piece.file, piece.tensor][piece.start : piece.stop]
            assert all(item is None for item in got[piece.at : piece.at + len(read)]), "an element is read twice"
            got[piece.at : piece.at + len(read)] = read
        assert got == [(span.param, span.start + index) for index in range(span.numel)]


def test_an_element_in_no_file_is_named() -> None:
    files, _ = described(layouts([10, 7], 2, sharded=False))
    fragments = read_fragments(files[:1])
    with pytest.raises(CheckpointError, match="master of 'p0' is incomplete: element 6 is in no file"):
        fragments.slices("master", "p0", 0, 10)
