"""Which rows make up which optimizer step, and which rank sees them when. Standard library only.

The order is a function of seed, epoch and data alone. The rows of an optimizer step do not depend on the number of
ranks or the micro-batch, so runs on other machines see the same steps, and a run can be continued anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

# Optimizer steps whose rows are sorted by length together. More saves padding, fewer mixes better.
_STEPS_PER_BUCKET = 16


@dataclass(frozen=True, slots=True)
class RowOrder:
    """The order of rows over a run.

    The last step of an epoch is filled up with rows from the start of the epoch's order, so every row is seen in
    every epoch and every step has the same number of rows (as `torch.utils.data.DistributedSampler` does).

    Args:
        num_rows: training rows.
        global_batch_size: rows per optimizer step over all ranks.
        seed: seed of the shuffle.
        lengths: length of each row; rows of a step are then of similar length. None shuffles without that.
    """

    num_rows: int
    global_batch_size: int
    seed: int
    lengths: Sequence[int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.num_rows // self.global_batch_size)

    def epoch(self, index: int) -> list[list[int]]:
        """Return the rows of each optimizer step of an epoch."""
        draw = random.Random(f"{self.seed}:{index}")  # a text seed is hashed in a way that never changes
        rows = list(range(self.num_rows))
        draw.shuffle(rows)
        size = self.global_batch_size
        rows = list(islice(cycle(rows), self.steps_per_epoch * size))
        if self.lengths is None:
            return [rows[start : start + size] for start in range(0, len(rows), size)]
        steps: list[list[int]] = []
        bucket = size * _STEPS_PER_BUCKET
        for start in range(0, len(rows), bucket):
            near = sorted(rows[start : start + bucket], key=self.lengths.__getitem__)
            steps += [near[at : at + size] for at in range(0, len(near), size)]
        draw.shuffle(steps)
        return steps


def micro_batches(step_rows: Sequence[int], rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """Return one rank's rows of each forward pass of an optimizer step.

    Neighbours go to different ranks, so that with rows sorted by length no rank waits for a longer batch.

    Args:
        step_rows: the rows of the step over all ranks; their number is a multiple of the next two.
        rank: this rank.
        world_size: number of ranks.
        micro_batch_size: rows per rank and forward pass.
    """
    wide = world_size * micro_batch_size
    assert len(step_rows) % wide == 0, (len(step_rows), wide)
    return [list(step_rows[start + rank : start + wide : world_size]) for start in range(0, len(step_rows), wide)]


def evaluation_batches(lengths: Sequence[int], rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """Return one rank's rows of each forward pass of an evaluation: every row on one rank, once.

    All ranks get the same number of batches, because a forward pass may be a collective (ZeRO-3 gathers weights in
    it). A rank that has no rows left gets an empty list. Long rows come first, so that a batch that does not fit in
    memory fails at once.

    Args:
        lengths: length of each row.
        rank: this rank.
        world_size: number of ranks.
        batch_size: rows per rank and forward pass.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    mine = rows[rank::world_size]
    most = -(-len(rows) // world_size)
    return [mine[start : start + batch_size] for start in range(0, most, batch_size)]
