"""Which rows a step has depends on seed and data alone; every row is used."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from progtuning_ds.train.order import RowOrder, evaluation_batches, micro_batches

lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=200)


@given(lengths=lengths_of, batch=st.integers(1, 24), seed=st.integers(0, 5), grouped=st.booleans())
def test_every_row_is_seen_in_every_epoch_and_every_step_is_full(
    lengths: list[int], batch: int, seed: int, grouped: bool
) -> None:
    order = RowOrder(len(lengths), batch, seed, lengths if grouped else None)
    steps = order.epoch(3)
    assert len(steps) == order.steps_per_epoch == -(-len(lengths) // batch)
    assert {len(step) for step in steps} == {batch}
    seen = Counter(row for step in steps for row in step)
    assert set(seen) == set(range(len(lengths)))
    assert max(seen.values()) - min(seen.values()) <= 1, "what fills the last step up is spread evenly"


@given(
    micro=st.integers(1, 4),
    world_size=st.integers(1, 5),
    passes=st.integers(1, 4),
    data=st.data(),
)
def test_ranks_share_a_step_without_loss_whatever_their_number(
    micro: int, world_size: int, passes: int, data: st.DataObject
) -> None:
    count = micro * world_size * passes
    rows = data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count))
    shares = [micro_batches(rows, rank, world_size, micro) for rank in range(world_size)]
    assert Counter(row for share in shares for batch in share for row in batch) == Counter(rows)
    assert {len(share) for share in shares} == {passes}
    assert {len(batch) for share in shares for batch in share} == {micro}


def test_the_order_changes_with_epoch_and_seed_only() -> None:
    one = RowOrder(100, 8, seed=1)
    assert one.epoch(0) == RowOrder(100, 8, seed=1).epoch(0)
    assert one.epoch(0) != one.epoch(1)
    assert one.epoch(0) != RowOrder(100, 8, seed=2).epoch(0)


def test_a_known_order_never_changes() -> None:
    """A resumed run must find the order it left, under any later version of Python or this package."""
    assert RowOrder(10, 4, seed=0).epoch(0) == [[5, 0, 3, 2], [7, 8, 6, 4], [1, 9, 5, 0]]


def test_grouping_by_length_saves_padding_and_mixes_lengths_over_steps() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(1000)]

    def padded(order: RowOrder) -> int:
        return sum(len(step) * max(lengths[row] for row in step) for step in order.epoch(0))

    assert padded(RowOrder(1000, 10, 0, lengths)) < 1.15 * sum(lengths)
    assert padded(RowOrder(1000, 10, 0)) > 1.5 * sum(lengths)
    means = [sum(lengths[row] for row in step) / 10 for step in RowOrder(1000, 10, 0, lengths).epoch(0)]
    first, last = sum(means[:50]) / 50, sum(means[50:]) / 50
    assert abs(first - last) < 15, "an epoch must not go from short to long"


def test_neighbours_in_length_go_to_different_ranks() -> None:
    shares = [micro_batches(list(range(12)), rank, 2, 3) for rank in range(2)]
    assert shares == [[[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]]]


@given(lengths=lengths_of, world_size=st.integers(1, 7), batch=st.integers(1, 9))
def test_an_evaluation_has_every_row_once_and_as_many_passes_on_every_rank(
    lengths: list[int], world_size: int, batch: int
) -> None:
    shares = [evaluation_batches(lengths, rank, world_size, batch) for rank in range(world_size)]
    rows = [row for share in shares for part in share for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert all(len(part) <= batch for share in shares for part in share)
