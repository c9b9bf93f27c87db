"""The least traffic from one layout of optimizer state to another.

Owns repartition plans as plain frozen values; imports the standard library and ``layout`` only. What is planned
here is executed by ``progtuning_ds.transfer``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from progtuning_ds.layout import Layout, Span, flat_layout, padded_numel


@dataclass(frozen=True, slots=True)
class Move:
    """Copy ``numel`` elements of ``param`` from one rank's share of an old buffer to one of a new buffer."""

    param: str
    start: int
    numel: int
    src_rank: int
    src_buffer: int
    src_offset: int
    dst_rank: int
    dst_buffer: int
    dst_offset: int

    @property
    def crosses_ranks(self) -> bool:
        """True if the elements change rank."""
        return self.src_rank != self.dst_rank


@dataclass(frozen=True, slots=True)
class RepartitionPlan:
    """What it takes to turn one layout into another: every surviving element moves once, local moves included."""

    moves: tuple[Move, ...]
    fresh: tuple[Span, ...]
    dropped: tuple[Span, ...]

    @property
    def numel_between_ranks(self) -> int:
        """Elements that leave their rank, summed over all ranks."""
        return sum(move.numel for move in self.moves if move.crosses_ranks)


def plan_repartition(old: Layout, new: Layout) -> RepartitionPlan:
    """Moves that carry every element present in both layouts, exactly once, from its old place to its new one.

    Neighbouring elements that stay neighbours travel as one move. ``fresh`` are the new spans of parameters that
    ``old`` does not hold, ``dropped`` the old spans of parameters that ``new`` does not hold.

    Raises:
        ValueError: if the world sizes differ or a parameter has another size in the two layouts.
    """
    if old.world_size != new.world_size:
        raise ValueError(f"world_size must not change in a repartition, got {old.world_size} -> {new.world_size}")
    sources = _by_param(old)
    targets = _by_param(new)
    for name in sources.keys() & targets.keys():
        sizes = [sum(span.numel for span in side[name]) for side in (sources, targets)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"parameter {name!r} must keep its size in a repartition, got {sizes[0]} -> {sizes[1]}")
    moves: list[Move] = []
    for name, spans in targets.items():
        for target in spans:
            moves.extend(_overlaps(sources.get(name, ()), target))
    return RepartitionPlan(
        moves=tuple(moves),
        fresh=tuple(span for span in new.spans if span.param not in sources),
        dropped=tuple(span for span in old.spans if span.param not in targets),
    )


def _by_param(layout: Layout) -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {}
    for span in layout.spans:
        spans.setdefault(span.param, []).append(span)
    return spans


def _overlaps(sources: Iterable[Span], target: Span) -> Iterator[Move]:
    for source in sources:
        start = max(source.start, target.start)
        stop = min(source.start + source.numel, target.start + target.numel)
        if start < stop:
            yield Move(
                target.param,
                start,
                stop - start,
                source.rank,
                source.buffer,
                source.offset + start - source.start,
                target.rank,
                target.buffer,
                target.offset + start - target.start,
            )


def merge_moves(moves: Iterable[Move]) -> tuple[Move, ...]:
    """Join moves whose elements are neighbours on both sides; the joined move keeps the first one's parameter."""
    merged: list[Move] = []
    for move in moves:
        last = merged[-1] if merged else None
        if last is not None and _continues(last, move):
            merged[-1] = _lengthened(last, move.numel)
        else:
            merged.append(move)
    return tuple(merged)


def _continues(last: Move, move: Move) -> bool:
    same_places = (last.src_rank, last.src_buffer, last.dst_rank, last.dst_buffer) == (
        move.src_rank,
        move.src_buffer,
        move.dst_rank,
        move.dst_buffer,
    )
    return (
        same_places
        and last.src_offset + last.numel == move.src_offset
        and last.dst_offset + last.numel == move.dst_offset
    )


def _lengthened(move: Move, extra: int) -> Move:
    places = (
        move.src_rank,
        move.src_buffer,
        move.src_offset,
        move.dst_rank,
        move.dst_buffer,
        move.dst_offset,
    )
    return Move(move.param, move.start, move.numel + extra, *places)


def split_move(move: Move, limit: int) -> Iterator[Move]:
    """Cut a move into pieces of at most ``limit`` elements."""
    for done in range(0, move.numel, limit):
        yield Move(
            move.param,
            move.start + done,
            min(limit, move.numel - done),
            move.src_rank,
            move.src_buffer,
            move.src_offset + done,
            move.dst_rank,
            move.dst_buffer,
            move.dst_offset + done,
        )


def least_traffic(old: Layout, buffer: int, survivors: Sequence[str]) -> int:
    """Lower bound on the elements that must change rank when ``survivors`` of one flat buffer are re-balanced.

    A rank that holds more survivors than an equal share must give the surplus away; nobody else has to send.
    """
    kept = set(survivors)
    held = [0] * old.world_size
    for span in old.spans:
        if span.buffer == buffer and span.param in kept:
            held[span.rank] += span.numel
    share = padded_numel(sum(held), old.world_size) // old.world_size
    return sum(max(0, numel - share) for numel in held)


def order_survivors(old: Layout, buffer: int, survivors: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Order ``survivors`` of one flat buffer so that re-balancing it moves as few elements as we can arrange.

    A flat buffer is cut by position, so the order of its parameters decides who owns what. Two orders are compared
    by their exact traffic: the one they have, and one that fills each rank's share with that rank's own parameters
    first and fills gaps from ranks that hold more than a share. Parameters are not cut by the order, so the result
    is within one parameter per rank boundary of ``least_traffic``.
    """
    given = tuple(survivors)
    candidates = [given, _own_first(old, buffer, given)]
    return min(candidates, key=lambda order: _traffic(old, buffer, order))


def _traffic(old: Layout, buffer: int, order: Sequence[tuple[str, int]]) -> int:
    kept = {name for name, _ in order}
    source = Layout(
        old.world_size,
        tuple(span for span in old.spans if span.buffer == buffer and span.param in kept),
        old.partition_numel,
    )
    return plan_repartition(source, flat_layout([order], old.world_size)).numel_between_ranks


def _own_first(old: Layout, buffer: int, survivors: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    owner = _main_owner(old, buffer)
    queues: list[list[tuple[str, int]]] = [[] for _ in range(old.world_size)]
    for item in survivors:
        queues[owner[item[0]]].append(item)
    share = padded_numel(sum(numel for _, numel in survivors), old.world_size) // old.world_size
    surplus = [sum(numel for _, numel in queue) - share for queue in queues]
    order: list[tuple[str, int]] = []
    filled = 0
    for rank in range(old.world_size):
        end = (rank + 1) * share
        while filled < end and any(queues):
            # What rank cannot fill itself comes from whoever holds most above a share.
            donors = [other for other in range(old.world_size) if queues[other]]
            donor = rank if queues[rank] else max(donors, key=lambda other: surplus[other])
            item = queues[donor].pop(0)
            if donor != rank:
                surplus[donor] -= item[1]
            order.append(item)
            filled += item[1]
    assert not any(queues), "shares add up to at least all survivors"
    return tuple(order)


def _main_owner(old: Layout, buffer: int) -> dict[str, int]:
    most: dict[str, tuple[int, int]] = {}
    for span in old.spans:
        if span.buffer == buffer and span.numel > most.get(span.param, (0, 0))[0]:
            most[span.param] = (span.numel, span.rank)
    return {name: rank for name, (_, rank) in most.items()}


def check_exact(plan: RepartitionPlan, old: Layout, new: Layout) -> None:
    """Assert that each surviving element lands exactly once; used by tests and, cheaply, before execution."""
    landed: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for move in plan.moves:
        landed.setdefault((move.dst_rank, move.dst_buffer), []).append((move.dst_offset, move.dst_offset + move.numel))
    for ranges in landed.values():
        ranges.sort()
        for (_, stop), (start, _) in pairwise(ranges):
            assert stop <= start, f"two moves land on the same elements: {stop} > {start}"
    carried = sum(move.numel for move in plan.moves)
    fresh = sum(span.numel for span in plan.fresh)
    assert carried + fresh == sum(span.numel for span in new.spans), "a new element has no source"
    dropped = sum(span.numel for span in plan.dropped)
    assert carried + dropped == sum(span.numel for span in old.spans), "an old element is neither carried nor dropped"
