"""What becomes of the weights of a block that has frozen for good: kept, or quantized. Standard library only.

Owns the words for it, the bytes it leaves, and the plans and engines it fits. The layers themselves are
`progtuning_ds.methods.frozen_linear`'s.
"""

from __future__ import annotations

from collections.abc import Collection

from progtuning_ds.schedule import StagePlan

KINDS = ("keep", "int8", "nf4")
"""As they are, bytes with a scale per output, or 4-bit NormalFloat in blocks of 64 with 8-bit scales (QLoRA, arXiv
2305.14314)."""
NF4_BLOCK = 64
_SCALES_BLOCK, _SCALES_MEAN = 256, 4
TABLE_BYTES = {"keep": 0, "int8": 0, "nf4": 4 * (16 + 256)}
"""What all layers of a model share: the values of NF4's codes and of its 8-bit scales."""


def weight_bytes(kind: str, outputs: int, inputs: int, *, element: int, ranks: int = 1) -> int:
    """Bytes that a rank holds of one linear layer's weight.

    Args:
        kind: one of ``KINDS``.
        outputs: rows of the weight.
        inputs: columns.
        element: bytes of an element that is not quantized.
        ranks: how many share the weight (ZeRO-3); scales are whole on each. ``TABLE_BYTES`` are held once beside.
    """
    numel = outputs * inputs
    if kind == "keep":
        return element * -(-numel // ranks)
    codes = -(-code_bytes(kind, numel) // ranks)
    if kind == "int8":
        return codes + 4 * outputs
    blocks = -(-numel // NF4_BLOCK)
    return codes + blocks + 4 * -(-blocks // _SCALES_BLOCK) + _SCALES_MEAN


def code_bytes(kind: str, numel: int) -> int:
    """Bytes of the codes of ``numel`` elements, "int8" or "nf4", without their scales."""
    return -(-numel // 2) if kind == "nf4" else numel


def freezing_blocks(plan: StagePlan, stage: int) -> tuple[int, ...]:
    """Blocks that do not train in ``stage`` nor later, lowest first: frozen for good when it begins."""
    training = {block for later in plan.stages[stage:] for block in later.trainable_blocks}
    return tuple(block for block in range(plan.num_blocks) if block not in training)


def why_not(
    kind: str,
    plan: StagePlan,
    shapes: Collection[tuple[int, int]],
    *,
    element: int,
    sharing_ranks: int,
    offloads_parameters: bool,
) -> str | None:
    """Say in words why frozen blocks cannot be quantized, or None.

    Args:
        kind: one of ``KINDS``, not "keep".
        plan: what trains when.
        shapes: (outputs, inputs) of the linear layers in blocks.
        element: bytes of a weight that is not quantized.
        sharing_ranks: ranks that share each weight: all of them under ZeRO-3, else one.
        offloads_parameters: whether ZeRO-3 keeps weights in host memory.
    """
    if not freezing_blocks(plan, len(plan.stages) - 1):
        return "no block of the plan freezes"
    returning = _returning(plan)
    if returning is not None:
        return f"block {returning[0]} trains again in stage {returning[1]}, and what was quantized cannot"
    if not shapes:
        return "the blocks have no layers of class nn.Linear (or GPT-2's Conv1D)"
    if offloads_parameters:
        return "it does not go with zero_optimization.offload_param; offload the optimizer alone"
    before, after = (_total(one, shapes, element, sharing_ranks) for one in ("keep", kind))
    if after >= before:
        return (
            f"it does not pay on {sharing_ranks} ranks: of these weights a rank holds {before:,} bytes, and with "
            f"{kind} {after:,}, because scales are not shared among ranks"
        )
    return None


def _returning(plan: StagePlan) -> tuple[int, int] | None:
    """The first block that trains again after a stage without it, and the stage in which it does."""
    left: set[int] = set()
    for earlier, stage in zip(plan.stages, plan.stages[1:], strict=False):
        left |= set(earlier.trainable_blocks) - set(stage.trainable_blocks)
        back = sorted(left & set(stage.trainable_blocks))
        if back:
            return back[0], stage.index
    return None


def _total(kind: str, shapes: Collection[tuple[int, int]], element: int, ranks: int) -> int:
    return sum(weight_bytes(kind, *shape, element=element, ranks=ranks) for shape in shapes)
