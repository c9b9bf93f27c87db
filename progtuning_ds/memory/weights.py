"""Bytes of the weights a rank holds: flat buffers, shards, quantized bases and frozen blocks. Standard library only.

Who pads what is DeepSpeed's doing, what goes when a block is quantized this project's; tests compare both with live
engines.
"""

from __future__ import annotations

from collections.abc import Sequence

from progtuning_ds.layout import padded_numel, shard_numel
from progtuning_ds.memory.parameters import Group, Param, ParamTable
from progtuning_ds.memory.passing import gathers
from progtuning_ds.memory.setup import EngineSetup
from progtuning_ds.memory.state import FP32_BYTES
from progtuning_ds.on_freeze import NF4_BLOCK, TABLE_BYTES, code_bytes, freezing_blocks, weight_bytes
from progtuning_ds.schedule import StagePlan

_TABLES = 4 * 16, 4 * 256
"""What bitsandbytes holds for every weight: the values of NF4's codes, and of its 8-bit scales."""


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
    base = [p for p in params.params if in_quantized_base(p, setup)]
    away |= {param.name for param in base}
    dense = [p for p in params.params if p.name not in away]
    if setup.zero_stage == 3:
        shards = sum(shard_numel(param.numel, setup.world_size) for param in dense)
        numel = shards
    else:
        # A flat buffer goes as a whole, padding included; what stays of it moves out.
        flat = [group for group in initial if away.isdisjoint(param.name for param in group.params)]
        padding = sum(_padded(setup, group.numel) - group.numel for group in flat)
        numel = sum(param.numel for param in dense) + padding
    of_base = sum(_base_bytes(setup, *param.base) for param in base if param.base is not None)
    held = {"weights": setup.element * numel + of_base + persistent_bytes(params, setup, quantized)}
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


def persistent_bytes(params: ParamTable, setup: EngineSetup, quantized: Sequence[Param] = ()) -> int:
    """Bytes of what ZeRO-3 keeps whole on every rank, as gathered (``mark_persistent_parameters``)."""
    if not gathers(setup):
        return 0
    away = {param.name for param in quantized}
    stored = [_stored(p, setup) for p in params.params if p.name not in away]
    return sum(
        element * shard_numel(numel, setup.world_size) * setup.world_size
        for numel, element in stored
        if numel <= setup.persistence_threshold
    )


def in_quantized_base(param: Param, setup: EngineSetup) -> bool:
    """Whether a weight lies quantized from the start, under adapters."""
    return setup.frozen_bits < 16 and param.base is not None


def gathered_bytes(params: ParamTable, setup: EngineSetup, quantized: Sequence[Param]) -> tuple[int, int]:
    """Bytes of what ZeRO-3 gathers, whole: of the largest weight, and of all together.

    Of quantized weights it gathers the codes, which are never persistent, however small.
    """
    away = {param.name for param in quantized}
    stored = [
        _stored(param, setup)
        for param in params.params
        # bitsandbytes' 8-bit layers have the codes whole all the time and let go of what was gathered.
        if param.name not in away and not (setup.frozen_bits == 8 and in_quantized_base(param, setup))
    ]
    whole = [element * numel for numel, element in stored if numel > setup.persistence_threshold]
    whole += [code_bytes(setup.on_freeze, param.numel) for param in quantized]
    return max(whole, default=0), sum(whole)


def dense_while_computing(setup: EngineSetup, quantized: Sequence[Param]) -> int:
    """Bytes of the largest quantized weight as its layer reads it, in fp32 first with int8."""
    largest = max((param.numel for param in quantized), default=0)
    in_fp32 = FP32_BYTES if setup.on_freeze == "int8" and setup.element != FP32_BYTES else 0
    return (setup.element + in_fp32) * largest


def base_while_computing(params: ParamTable, setup: EngineSetup) -> int:
    """Bytes of the largest weight of a quantized base as its layer reads it in backward."""
    return setup.element * max((p.numel for p in params.params if in_quantized_base(p, setup)), default=0)


def _padded(setup: EngineSetup, numel: int) -> int:
    """Elements of a group's flat buffer; stage 0 pads nothing."""
    return numel if setup.zero_stage == 0 else padded_numel(numel, setup.world_size)


def _stored(param: Param, setup: EngineSetup) -> tuple[int, int]:
    """Elements of a parameter as ZeRO-3 sees it, and bytes of each; codes are a byte, and in NF4 two elements."""
    if in_quantized_base(param, setup):
        return code_bytes("nf4" if setup.frozen_bits == 4 else "int8", param.numel), 1
    return param.numel, setup.element


def _base_bytes(setup: EngineSetup, outputs: int, inputs: int) -> int:
    """Of a weight of a quantized base as bitsandbytes' layers hold it: codes, scales, tables of its own."""
    numel, ranks = outputs * inputs, setup.world_size if setup.zero_stage == 3 else 1
    if setup.frozen_bits == 8:
        # Beside the shard that ZeRO-3 makes, the layer keeps the codes whole.
        return weight_bytes("int8", outputs, inputs, element=setup.element, ranks=ranks) + (numel if ranks > 1 else 0)
    of_codes, of_scales = _TABLES
    if setup.double_quant:
        whole = weight_bytes("nf4", outputs, inputs, element=setup.element, ranks=ranks)
        return whole + of_codes + of_scales
    return shard_numel(code_bytes("nf4", numel), ranks) + FP32_BYTES * -(-numel // NF4_BLOCK) + of_codes
