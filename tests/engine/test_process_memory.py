"""What a transition costs and gives back, by the account of the kernel, of the allocator and of torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.engine.bytes_held import DeviceMemory, Traffic
from tests.engine.flavours import ALL
from tests.engine.problem import Phase, shrinking
from tests.engine.ranks_train import ALL_BLOCKS, build_staged, optimizer_step
from tests.ranks import RankPools

CHUNK = 8 * 2**20
MARGIN = 2 * 2**20  # the interpreter's own objects, and pages that are partly used
SWAPPING = (Phase(1, ALL_BLOCKS), Phase(1, (0, 1, 4), embeddings=False), Phase(1, (1, 2, 3, 5)))


@dataclass
class Seen:
    """One transition on one rank; bytes."""

    released: int
    moved: int
    fallen: int
    peak: int  # above the steady state before
    sent: int
    collective: int


def watch_transitions(flavour: str, phases: tuple[Phase, ...], groups: str) -> list[Seen]:
    engine, stages = build_staged(ALL[flavour], phases, groups, "wide", {"chunk_bytes": CHUNK})
    seen = []
    for step in range(len(phases)):
        DeviceMemory.reset()
        before = DeviceMemory.read()
        with Traffic() as traffic:
            transition = stages.advance(step)
        after = DeviceMemory.read()
        if transition is not None:
            seen.append(
                Seen(
                    sum(transition.released_bytes.values()),
                    transition.moved_bytes,
                    before.now - after.now,
                    after.peak - before.now,
                    traffic.sent,
                    traffic.collective,
                )
            )
        optimizer_step(engine, "wide", step)
    return seen


@pytest.mark.parametrize("name", ["zero0-bf16", "zero2-fp32", "zero2-offload-bf16", "zero3-bf16"])
def test_a_planned_boundary_costs_nothing_and_memory_falls(ranks: RankPools, name: str) -> None:
    for seen in ranks(2).run(watch_transitions, flavour=name, phases=shrinking(steps=1), groups="plan"):
        assert len(seen) == 2
        for transition in seen:
            assert transition.released > 10 * MARGIN
            assert transition.fallen >= transition.released - MARGIN
            assert transition.peak <= MARGIN
            assert transition.moved == transition.sent == 0
            assert transition.collective <= 64, "a fingerprint of the plan is all that ranks exchange"


@pytest.mark.parametrize("name", ["zero2-fp32", "zero2-offload-bf16", "bf16-optimizer", "zero3-bf16"])
def test_an_unplanned_change_stays_within_its_limit(ranks: RankPools, name: str) -> None:
    by_rank = ranks(2).run(watch_transitions, flavour=name, phases=SWAPPING, groups="ordinary")
    for transitions in zip(*by_rank, strict=True):
        assert sum(t.sent for t in transitions) == transitions[0].moved
        for transition in transitions:
            growth = max(0, -transition.released)
            assert transition.fallen >= transition.released - MARGIN
            assert transition.peak <= growth + CHUNK + MARGIN
            assert transition.collective <= 64
    if ALL[name].stage == 3:
        assert all(t.moved == 0 for seen in by_rank for t in seen), "every rank has its own share of every parameter"
