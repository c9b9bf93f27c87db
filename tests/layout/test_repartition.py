"""Repartition plans: every surviving element lands exactly once, with as little traffic as balance allows."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning_ds.layout import flat_layout, sharded_layout
from progtuning_ds.repartition import (
    check_exact,
    least_traffic,
    merge_moves,
    order_survivors,
    plan_repartition,
    split_move,
)
from tests.layout.strategies import groups_and_target, sized_groups, world_sizes

layouts = st.sampled_from([flat_layout, sharded_layout])


def _fill(layout):
    """Buffers whose elements name the parameter element they hold; padding is None."""
    held = {
        (rank, buffer): [None] * numel
        for rank in range(layout.world_size)
        for buffer, numel in enumerate(layout.partition_numel)
    }
    for span in layout.spans:
        for i in range(span.numel):
            held[span.rank, span.buffer][span.offset + i] = (span.param, span.start + i)
    return held


def _execute(moves, old, new_layout):
    new = {key: [None] * len(values) for key, values in _fill(new_layout).items()}
    for move in moves:
        for i in range(move.numel):
            target = new[move.dst_rank, move.dst_buffer]
            assert target[move.dst_offset + i] is None, "an element lands on another"
            target[move.dst_offset + i] = old[move.src_rank, move.src_buffer][move.src_offset + i]
    return new


@given(groups_and_target(), world_sizes, layouts, layouts)
def test_every_surviving_element_lands_exactly_once(groups, world_size, before, after):
    old_groups, new_groups = groups
    old, new = before(old_groups, world_size), after(new_groups, world_size)
    plan = plan_repartition(old, new)
    check_exact(plan, old, new)
    landed = _execute(plan.moves, _fill(old), new)
    survivors = {name for group in old_groups for name, _ in group}
    wanted = {
        key: [element if element and element[0] in survivors else None for element in values]
        for key, values in _fill(new).items()
    }
    assert landed == wanted
    assert _execute(merge_moves(plan.moves), _fill(old), new) == wanted


@given(groups_and_target(), world_sizes, layouts)
def test_the_way_back_restores_what_stayed(groups, world_size, layout):
    old, new = (layout(side, world_size) for side in groups)
    there = _execute(plan_repartition(old, new).moves, _fill(old), new)
    back = _execute(plan_repartition(new, old).moves, there, old)
    stayed = {name for group in groups[1] for name, _ in group}
    assert back == {
        key: [element if element and element[0] in stayed else None for element in values]
        for key, values in _fill(old).items()
    }


@given(sized_groups(), world_sizes, layouts)
def test_an_unchanged_layout_moves_nothing_between_ranks(groups, world_size, layout):
    same = layout(groups, world_size)
    plan = plan_repartition(same, same)
    assert plan.numel_between_ranks == 0
    assert not plan.fresh
    assert not plan.dropped


@given(sized_groups(max_groups=4), world_sizes, st.data())
def test_dropping_whole_groups_moves_nothing(groups, world_size, data):
    keep = [group for group in groups if data.draw(st.booleans())]
    old, new = flat_layout(groups, world_size), flat_layout(keep, world_size)
    assert plan_repartition(old, new).numel_between_ranks == 0


@given(sized_groups(max_groups=3), sized_groups(max_groups=3), world_sizes)
def test_sharded_state_never_crosses_ranks(groups, others, world_size):
    new = [group for group in (groups[0][::2], *groups[1:], [(f"x{n}", s) for n, s in others[0]]) if group]
    plan = plan_repartition(sharded_layout(groups, world_size), sharded_layout(new, world_size))
    assert plan.numel_between_ranks == 0


@given(sized_groups(max_groups=1, max_params=6), st.integers(2, 4), st.data())
def test_survivors_are_ordered_for_nearly_least_traffic(groups, world_size, data):
    group = groups[0]
    old = flat_layout([group], world_size)
    survivors = [item for item in group if data.draw(st.booleans())] or group[:1]

    def traffic(order):
        # Only what stays in the buffer is compared; what leaves is not carried.
        kept = flat_layout([order], world_size)
        return sum(m.numel for m in plan_repartition(old, kept).moves if m.crosses_ranks)

    chosen = traffic(order_survivors(old, 0, survivors))
    best = min(traffic(order) for order in permutations(survivors))
    largest = max(numel for _, numel in survivors)
    assert sorted(order_survivors(old, 0, survivors)) == sorted(survivors)
    assert least_traffic(old, 0, [name for name, _ in survivors]) <= best
    assert chosen <= traffic(survivors)
    assert chosen <= best + (world_size - 1) * largest


def test_freezing_the_low_half_of_one_group_moves_the_least_possible():
    group = [(f"block{i}", 100) for i in range(8)]
    old = flat_layout([group], 4)
    survivors = group[4:]
    order = order_survivors(old, 0, survivors)
    plan = plan_repartition(old, flat_layout([order], 4))
    bound = least_traffic(old, 0, [name for name, _ in survivors])
    assert bound == 200  # ranks 2 and 3 held 200 each of the 400 that stay; a share is now 100
    assert plan.numel_between_ranks == bound


@given(groups_and_target(), world_sizes, st.integers(1, 50))
def test_split_moves_are_small_and_carry_the_same(groups, world_size, limit):
    old, new = (flat_layout(side, world_size) for side in groups)
    plan = plan_repartition(old, new)
    pieces = [piece for move in plan.moves for piece in split_move(move, limit)]
    assert all(0 < piece.numel <= limit for piece in pieces)
    assert _execute(pieces, _fill(old), new) == _execute(plan.moves, _fill(old), new)


def test_another_world_size_is_refused():
    group = [[("p", 10)]]
    with pytest.raises(ValueError, match="world_size must not change"):
        plan_repartition(flat_layout(group, 2), flat_layout(group, 3))


def test_another_size_of_a_parameter_is_refused():
    with pytest.raises(ValueError, match="'p' must keep its size"):
        plan_repartition(flat_layout([[("p", 10)]], 2), flat_layout([[("p", 11)]], 2))
