"""Closed formulas for the bytes a rank holds, from DeepSpeed's documented layouts; an oracle for what is reported.

Independent of ``progtuning_ds``: written from how DeepSpeed partitions (stage_1_and_2.py, stage3.py,
bf16_optimizer.py), in terms of names, element counts and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.engine.flavours import Flavour

FP32 = 4
FLAT_ALIGNMENT = 2  # elements per rank, nccl_start_alignment_factor


def footprint(
    flavour: Flavour,
    groups: Sequence[Sequence[str]],
    numels: Mapping[str, int],
    rank: int,
    world_size: int,
    newcomers: Sequence[str] = (),
) -> dict[str, int]:
    """Bytes of masters, moments and lasting gradient buffers on ``rank``; ``newcomers`` have no moments yet."""
    shares = [share(flavour, [numels[n] for n in group], world_size) for group in groups]
    fresh = set(newcomers)
    old = sum(s for s, group in zip(shares, groups, strict=True) if not fresh.intersection(group))
    separate_masters = flavour.mixed or flavour.stage > 0
    return {
        "master_weights": FP32 * sum(shares) * separate_masters,
        "exp_avg": FP32 * old,
        "exp_avg_sq": FP32 * old,
    }


def share(flavour: Flavour, numels: Sequence[int], world_size: int) -> int:
    """Elements of a group that each rank owns, padding included."""
    if flavour.stage == 0:
        return sum(numels)
    if flavour.stage == 3:
        return sum(math.ceil(n / world_size) for n in numels)
    alignment = FLAT_ALIGNMENT * world_size
    return math.ceil(sum(numels) / alignment) * FLAT_ALIGNMENT


def gradient_bytes(
    flavour: Flavour, groups: Sequence[Sequence[str]], numels: Mapping[str, int], rank: int, world_size: int
) -> int:
    """Bytes of gradient buffers that live from step to step."""
    shares = sum(share(flavour, [numels[n] for n in group], world_size) for group in groups)
    size = flavour.numerics.weights.itemsize
    if flavour.stage == 3:  # one buffer for accumulation, and the masters' gradients under offload
        return shares * (flavour.numerics.accumulate.itemsize + FP32 * flavour.offload)
    if flavour.wrapper == "BF16_Optimizer":  # a whole fp32 gradient on every rank
        return shares * world_size * FP32
    if flavour.stage == 2 and flavour.offload:
        # The masters' gradients, bit16 weights on their way back, one whole gradient for each parameter that this
        # rank owns any element of, and two staging buffers as large as the largest parameter.
        owned = sum(numels[name] for group in groups for name in owned_names(group, numels, rank, world_size))
        largest = max(numels[name] for group in groups for name in group)
        return shares * (FP32 + size) + owned * size + 2 * largest * size
    return 0


def owned_names(group: Sequence[str], numels: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """Parameters of a flat group of which ``rank`` owns at least one element."""
    alignment = FLAT_ALIGNMENT * world_size
    size = math.ceil(sum(numels[n] for n in group) / alignment) * FLAT_ALIGNMENT
    owned, offset = [], 0
    for name in group:
        if offset < (rank + 1) * size and offset + numels[name] > rank * size:
            owned.append(name)
        offset += numels[name]
    return owned
