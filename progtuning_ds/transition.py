"""Owns what a transition from one stage to the next reports, and says it in a line. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageTransition:
    """What one transition did, as seen by this rank.

    Attributes:
        stage: index of the stage that begins, None for a ``retarget`` outside the plan.
        step: optimizer step it begins with, None likewise.
        frozen: names of the parameters that left.
        unfrozen: names of the parameters that joined.
        released_bytes: bytes given back on this rank per category; negative where it grew. With ``on_freeze``,
            `weights` fall and `quantized_weights` grow.
        memory_bytes: bytes held on this rank per category afterwards (``Adapter.memory``).
        moved_bytes: bytes that crossed ranks, summed over all ranks.
        planned: True if whole groups were dropped and nothing else happened.
        seconds: wall-clock time on this rank.
    """

    stage: int | None
    step: int | None
    frozen: tuple[str, ...]
    unfrozen: tuple[str, ...]
    released_bytes: dict[str, int]
    memory_bytes: dict[str, int]
    moved_bytes: int
    planned: bool
    seconds: float


def describe(transition: StageTransition, num_stages: int) -> str:
    """One line for a log: what froze, what this rank gave back, what it cost."""
    stage = "retarget" if transition.stage is None else f"stage {transition.stage + 1}/{num_stages}"
    released = sum(transition.released_bytes.values()) / 2**20
    return (
        f"{stage}: {len(transition.frozen)} parameters froze, {len(transition.unfrozen)} joined, "
        f"{released:.1f} MiB released on this rank, {transition.moved_bytes / 2**20:.1f} MiB moved between ranks, "
        f"{transition.seconds * 1000:.0f} ms"
    )
