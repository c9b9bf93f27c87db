"""Bytes of the weights a rank holds: flat buffers, shards, quantized bases and frozen blocks. Standard library only.

Who pads what is DeepSpeed's doing, what goes when a block is quantized this project's; tests compare both with live
engines.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from progtuning_ds.layout import padded_numel, shard_numel
from progtuning_ds.memory.parameters import Group, Param, ParamTable
from progtuning_ds.memory.passing import gathers
from progtuning_ds.memory.setup import EngineSetup
from progtuning_ds.memory.state import FP32_BYTES
from progtuning_ds.on_freeze import TABLE_BYTES, code_bytes, freezing_blocks, weight_bytes
from progtuning_ds.schedule import StagePlan

_BASE_BLOCK = 64


def quantized_params(params: ParamTable, plan: StagePlan, setup: EngineSetup, stage: int) -> tuple[Param, ...]:
    """Weights that ``on_freeze`` has quantized by the time a stage trains; what never trains, in the first already."""
    if setup.on_freeze == "keep":
        return ()
    frozen = set(freezing_blocks(plan, stage))
    return tuple(
        param
        for param in params.params
        if param.matrix is not None and param.component in frozen and not param.matches(plan.always_train)
    )


def held_weights(
    params: ParamTable, initial: Sequence[Group], setup: EngineSetup, quantized: Sequence[Param]
) -> dict[str, int]:
    """Bytes under the weights, as ``StageEngine.memory()`` counts them.

    Args:
        params: of the model.
        initial: groups that the optimizer was built with.
        setup: the engine.
        quantized: from `quantized_params`.
    """
    away = {param.name for param in quantized}
    base = _base_bytes(setup, [p.numel for p in params.params if p.frozen])
    dense = [p for p in params.params if not p.frozen and p.name not in away]
    if setup.zero_stage == 3:
        shards = sum(shard_numel(param.numel, setup.world_size) for param in dense)
        numel = shards + persistent_numel(params, setup, away)
    else:
        # A flat buffer goes as a whole, padding included; what stays of it moves out.
        flat = [group for group in initial if away.isdisjoint(param.name for param in group.params)]
        padding = sum(_padded(setup, group.numel) - group.numel for group in flat)
        numel = sum(param.numel for param in dense) + padding
    held = {"weights": setup.element * numel + base}
    if quantized:
        held["quantized_weights"] = TABLE_BYTES[setup.on_freeze] + sum(
            weight_bytes(
                setup.on_freeze,
                *param.matrix,
                element=setup.element,
                ranks=setup.world_size if setup.zero_stage == 3 else 1,
            )
            for param in quantized
            if param.matrix is not None
        )
    return held


def persistent_numel(params: ParamTable, setup: EngineSetup, away: Collection[str] = ()) -> int:
    """Elements of what ZeRO-3 keeps whole on every rank, as gathered (``mark_persistent_parameters``)."""
    if not gathers(setup):
        return 0
    small = (p.numel for p in params.params if p.numel <= setup.persistence_threshold and p.name not in away)
    return sum(shard_numel(numel, setup.world_size) * setup.world_size for numel in small)


def gathered_bytes(params: ParamTable, setup: EngineSetup, quantized: Sequence[Param]) -> tuple[int, int]:
    """Bytes of what ZeRO-3 gathers, whole: of the largest weight, and of all together.

    Of quantized weights it gathers the codes, which are never persistent, however small.
    """
    away = {param.name for param in quantized}
    dense = [p.numel for p in params.params if p.numel > setup.persistence_threshold and p.name not in away]
    whole = [setup.element * numel for numel in dense]
    whole += [code_bytes(setup.on_freeze, param.numel) for param in quantized]
    return max(whole, default=0), sum(whole)


def dense_while_computing(setup: EngineSetup, quantized: Sequence[Param]) -> int:
    """Bytes of the largest quantized weight as its layer reads it, in fp32 first with int8."""
    largest = max((param.numel for param in quantized), default=0)
    in_fp32 = FP32_BYTES if setup.on_freeze == "int8" and setup.element != FP32_BYTES else 0
    return (setup.element + in_fp32) * largest


def _padded(setup: EngineSetup, numel: int) -> int:
    """Elements of a group's flat buffer; stage 0 pads nothing."""
    return numel if setup.zero_stage == 0 else padded_numel(numel, setup.world_size)


def _base_bytes(setup: EngineSetup, numels: Sequence[int]) -> int:
    """Of weights that never train."""
    shared = setup.world_size if setup.zero_stage == 3 else 1
    if setup.frozen_bits == 16:
        return setup.element * sum(shard_numel(numel, shared) for numel in numels)
    return sum(
        -(-shard_numel(numel, shared) * setup.frozen_bits // 8) + FP32_BYTES * -(-numel // (_BASE_BLOCK * shared))
        for numel in numels
    )
