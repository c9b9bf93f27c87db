"""Progtuning on live DeepSpeed engines: fine-tune a Transformer in stages, releasing memory as blocks freeze.

The public API; everything here is importable from ``progtuning_ds`` itself. Names load on first use, so that
planning does not pay for importing torch or DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from progtuning_ds.blocks import BlockMap, discover_blocks
    from progtuning_ds.engine import StageEngine
    from progtuning_ds.errors import ConfigError, StageTransitionError, UnsupportedDeepSpeedError
    from progtuning_ds.grouping import param_groups
    from progtuning_ds.optim import MaskedAdamW
    from progtuning_ds.schedule import Part, Stage, StagePlan, custom_plan, partition_blocks, plan_stages
    from progtuning_ds.trainer import ProgtuningCallback
    from progtuning_ds.transition import StageTransition

__version__ = "0.1.0.dev0"

_HOME = {
    "BlockMap": "blocks",
    "ConfigError": "errors",
    "MaskedAdamW": "optim",
    "Part": "schedule",
    "ProgtuningCallback": "trainer",
    "Stage": "schedule",
    "StageEngine": "engine",
    "StagePlan": "schedule",
    "StageTransition": "transition",
    "StageTransitionError": "errors",
    "UnsupportedDeepSpeedError": "errors",
    "custom_plan": "schedule",
    "discover_blocks": "blocks",
    "param_groups": "grouping",
    "partition_blocks": "schedule",
    "plan_stages": "schedule",
}

__all__ = [
    "BlockMap",
    "ConfigError",
    "MaskedAdamW",
    "Part",
    "ProgtuningCallback",
    "Stage",
    "StageEngine",
    "StagePlan",
    "StageTransition",
    "StageTransitionError",
    "UnsupportedDeepSpeedError",
    "__version__",
    "custom_plan",
    "discover_blocks",
    "param_groups",
    "partition_blocks",
    "plan_stages",
]


def __getattr__(name: str) -> Any:

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
