"""Random groups, survivors and world sizes for the layout tests."""

from __future__ import annotations

from hypothesis import strategies as st

Sized = tuple[tuple[str, int], ...]

world_sizes = st.integers(1, 5)


@st.composite
def sized_groups(draw: st.DrawFn, max_groups: int = 3, max_params: int = 6, max_numel: int = 40) -> list[list]:
    """Parameter groups as lists of (name, numel), names unique."""
    counts = draw(st.lists(st.integers(1, max_params), min_size=1, max_size=max_groups))
    number = iter(range(1000))
    return [[(f"p{next(number)}", draw(st.integers(1, max_numel))) for _ in range(count)] for count in counts]


@st.composite
def groups_and_target(draw: st.DrawFn) -> tuple[list[list], list[list]]:
    """Groups before and after: some parameters leave, some join, groups are cut anew."""
    old = draw(sized_groups())
    items = [item for group in old for item in group]
    kept = [item for item in items if draw(st.booleans())]
    joining = [(f"new{i}", draw(st.integers(1, 40))) for i in range(draw(st.integers(0, 3)))]
    pool = draw(st.permutations(kept + joining))
    cut = draw(st.integers(0, len(pool)))
    new = [group for group in (list(pool[:cut]), list(pool[cut:])) if group]
    return old, new
