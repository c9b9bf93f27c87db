"""Layouts describe what ZeRO does: every element has one place, ranks own equal shares."""

from __future__ import annotations

import torch
from hypothesis import given
from torch._utils import _flatten_dense_tensors

from progtuning_ds.layout import flat_layout, padded_numel, sharded_layout
from progtuning_ds.memory import Flavour, owned_numel
from tests.layout.strategies import sized_groups, world_sizes


def _places(layout):
    """Every (param, element) -> (rank, buffer, offset), spelled out."""
    places = {}
    for span in layout.spans:
        for i in range(span.numel):
            key = (span.param, span.start + i)
            assert key not in places, f"{key} has two places"
            places[key] = (span.rank, span.buffer, span.offset + i)
    return places


@given(sized_groups(), world_sizes)
def test_flat_layout_is_the_cut_of_the_flattened_buffer(groups, world_size):
    layout = flat_layout(groups, world_size)
    # Oracle: flatten numbered elements with torch's own function, pad, and cut into equal chunks.
    for buffer, group in enumerate(groups):
        numbered = {name: torch.arange(numel) + 1000 * (index + 1) for index, (name, numel) in enumerate(group)}
        flat = _flatten_dense_tensors(list(numbered.values()))
        total = padded_numel(flat.numel(), world_size)
        flat = torch.cat([flat, torch.full((total - flat.numel(),), -1)])
        shares = flat.chunk(world_size)
        assert {share.numel() for share in shares} == {layout.partition_numel[buffer]}
        for (name, element), (rank, where, offset) in _places(layout).items():
            if where == buffer:
                assert shares[rank][offset] == numbered[name][element]


@given(sized_groups(), world_sizes)
def test_flat_layout_places_every_element_once(groups, world_size):
    places = _places(flat_layout(groups, world_size))
    assert len(places) == sum(numel for group in groups for _, numel in group)
    assert len(set(places.values())) == len(places)


@given(sized_groups(), world_sizes)
def test_sharded_layout_gives_every_rank_its_shard_of_every_parameter(groups, world_size):
    layout = sharded_layout(groups, world_size)
    places = _places(layout)
    assert len(set(places.values())) == len(places) == sum(n for group in groups for _, n in group)
    for name, numel in (item for group in groups for item in group):
        whole = torch.arange(numel)
        size = -(-numel // world_size)
        for rank in range(world_size):
            shard = whole[rank * size : (rank + 1) * size].tolist()
            assert [e for (p, e), (r, _, _) in places.items() if p == name and r == rank] == shard


@given(sized_groups(), world_sizes)
def test_ranks_own_the_same_number_of_elements_up_to_padding(groups, world_size):
    for layout, stage in ((flat_layout(groups, world_size), 2), (sharded_layout(groups, world_size), 3)):
        sizes = [[numel for _, numel in group] for group in groups]
        share = owned_numel(sizes, Flavour(stage, world_size, bit16=True))
        assert share == sum(layout.partition_numel)
        owned = [layout.owned_numel(rank) for rank in range(world_size)]
        assert sum(owned) == sum(numel for group in sizes for numel in group)
        assert all(numel <= share for numel in owned)
        # Padding is bounded: alignment per group when flat, one element per parameter when sharded.
        slack = 2 * world_size * len(groups) if stage == 2 else world_size * sum(map(len, groups))
        assert share * world_size - sum(owned) < slack + 1
