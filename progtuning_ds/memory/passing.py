"""Bytes that come and go within a step: gradients, buckets, copies of the update. Standard library only.

When each of them is alive is DeepSpeed's doing; tests compare it with live engines.
"""

from __future__ import annotations

from collections.abc import Sequence

from progtuning_ds.memory.parameters import Group
from progtuning_ds.memory.setup import Batch, EngineSetup
from progtuning_ds.memory.state import BIT16_BYTES, FP32_BYTES, gradient_bytes, owned_numel


def gathers(setup: EngineSetup) -> bool:
    """Whether ZeRO-3 makes whole weights; a single rank's shard on the device is whole already."""
    return setup.zero_stage == 3 and (setup.world_size > 1 or setup.offload_param)


def lasting_gradients(setup: EngineSetup, numels: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Gradient buffers that live from step to step: bytes on the device and in host memory."""
    lasting = gradient_bytes(numels, setup.flavour)
    return (0, lasting) if setup.offload_optimizer else (lasting, 0)


def step_gradients(setup: EngineSetup, owned: int, trained: int) -> tuple[int, int]:
    """Gradients beside the lasting buffers: at the start of a step's first backward, and once it is complete."""
    element = FP32_BYTES if setup.fp32_gradients else setup.element
    if setup.offload_optimizer or setup.zero_stage == 3 or (setup.zero_stage == 1 and setup.fp32_gradients):
        return 0, 0
    if setup.zero_stage == 2:
        return 0, element * owned
    return 0, setup.element * trained


def scattered(setup: EngineSetup, largest: int) -> int:
    """What ZeRO-3 holds of the largest gradient: it is whole, and copied to be cut for all ranks.

    The copy is ``reduce_scatter_coalesced``'s. Embeddings, where they train, come last in backward.
    """
    return 2 * setup.element * largest


def bucket_bytes(setup: EngineSetup, largest: int) -> int:
    """Buffers in which gradients travel; ``largest`` is the size of the largest parameter."""
    if setup.zero_stage == 0:
        return 0
    buckets = setup.element * setup.reduce_bucket * (2 if setup.overlap_comm and setup.zero_stage < 3 else 1)
    # With offload below ZeRO-3 a gradient passes through a buffer as large as the largest.
    passage = setup.element * largest if setup.offload_optimizer and setup.zero_stage < 3 else 0
    return buckets + passage


def staging(setup: EngineSetup, batch: Batch, owned: int, largest: int) -> int:
    """Host buffers of ZeRO-1 and 2 with offload: updated weights on their way up, gradients that accumulate."""
    if setup.zero_stage == 3:
        return 0
    return setup.element * (owned + (owned if batch.accumulation > 1 else 0) + largest)


def visiting_moments(setup: EngineSetup, groups: Sequence[Group]) -> int:
    """Moments that come from host memory for the update, one group (in ZeRO-3, one sub-group) at a time."""
    shares = [owned_numel([g.numels], setup.flavour) for g in groups if g.last_stage in setup.host_parts]
    if setup.offload_optimizer or not shares:
        return 0
    largest = min(max(shares), setup.sub_group) if setup.zero_stage == 3 else max(shares)
    return 2 * largest * setup.state_bits // 8


def step_copy(setup: EngineSetup, groups: Sequence[Group]) -> int:
    """Copies of gradients that DeepSpeed makes for the update: flattened, then in fp32 (``step()``)."""
    if setup.kernel == "fused" or setup.offload_optimizer:
        return 0
    shares = [owned_numel([group.numels], setup.flavour) for group in groups]
    per_element = FP32_BYTES + (BIT16_BYTES if setup.flavour.bit16 else 0)
    if setup.zero_stage == 0:
        return FP32_BYTES * sum(shares) if setup.flavour.bit16 else 0
    if setup.zero_stage == 3:
        shares = [min(share, setup.sub_group) for share in shares]
    return per_element * max(shares, default=0)
