"""Group plans: one decision per parameter group, nothing lost, nothing trained twice."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning_ds.regroup import fingerprint, plan_groups

names = st.lists(st.sampled_from([f"p{i}" for i in range(12)]), unique=True, min_size=1, max_size=12)


@given(names, names, st.lists(st.integers(0, 11), max_size=4), st.integers(0, 3))
def test_exactly_the_target_trains_afterwards(current, target, cuts, origin):
    bounds = sorted({min(cut, len(current)) for cut in cuts} | {0, len(current)})
    groups = [current[a:b] for a, b in pairwise(bounds) if a < b]
    plan = plan_groups(groups, list(range(len(groups))), target, dict.fromkeys(set(target) - set(current), origin))
    after = [name for group in plan.groups for name in group.names]
    assert sorted(after) == sorted(target)
    assert set(plan.leaving) == set(current) - set(target)
    assert set(plan.joining) == set(target) - set(current)
    for group in plan.groups:
        if group.source is None:
            assert set(group.names) <= set(plan.joining)
        else:
            source = groups[group.source]
            assert list(group.names) == [name for name in source if name in set(target)]
            assert group.keep == (list(group.names) == list(source))
    assert plan.only_drops == (not plan.joining and all(group.keep for group in plan.groups))


def test_an_empty_target_is_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        plan_groups([["a"]], [0], [], {})


def test_fingerprints_tell_values_apart_and_fit_an_int64():
    values = [("a",), ("b",), ("a", "b"), (("a", "b"),), (1,), ("1",)]
    prints = [fingerprint(*value) for value in values]
    assert len(set(prints)) == len(values)
    assert all(0 <= value < 2**63 for value in prints)
    assert prints[0] == fingerprint("a")
