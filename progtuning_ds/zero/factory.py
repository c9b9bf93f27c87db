"""Chooses the adapter for a live engine by the class of its optimizer."""

from __future__ import annotations

from typing import Any

import deepspeed

from progtuning_ds.errors import UnsupportedDeepSpeedError
from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.bf16 import BF16Adapter
from progtuning_ds.zero.refusals import refuse_unsupported
from progtuning_ds.zero.stage0 import FusedAdapter, PlainAdapter, UnfusedAdapter
from progtuning_ds.zero.stage3 import Stage3Adapter
from progtuning_ds.zero.stage12 import Stage12Adapter

_BY_CLASS: dict[str, type[Adapter]] = {
    "DeepSpeedZeroOptimizer": Stage12Adapter,
    "DeepSpeedZeroOptimizer_Stage3": Stage3Adapter,
    "BF16_Optimizer": BF16Adapter,
    "FP16_Optimizer": FusedAdapter,
    "FP16_UnfusedOptimizer": UnfusedAdapter,
}


def build_adapter(engine: Any) -> Adapter:
    """Return the adapter for ``engine``'s optimizer.

    Raises:
        UnsupportedDeepSpeedError: for a feature, an optimizer class or a DeepSpeed version that is not supported.
    """
    refuse_unsupported(engine)
    name = type(engine.optimizer).__name__
    if name in _BY_CLASS:
        return _BY_CLASS[name](engine)
    if engine.optimizer is engine.basic_optimizer and engine.zero_optimization_stage() == 0:
        return PlainAdapter(engine)
    raise UnsupportedDeepSpeedError(
        f"StageEngine does not support {name} of DeepSpeed {deepspeed.__version__}; "
        f"supported are plain torch optimizers (ZeRO 0) and {', '.join(sorted(_BY_CLASS))}"
    )
