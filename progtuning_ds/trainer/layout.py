"""Owns the order of an optimizer's groups under a plan, for optimizers that someone else configured. No deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from progtuning_ds.blocks import BlockMap
from progtuning_ds.schedule import StagePlan


def lay_out(
    groups: Sequence[dict[str, Any]], model: nn.Module, plan: StagePlan, blocks: BlockMap
) -> list[dict[str, Any]]:
    """Split parameter groups by the stage after which their members leave, latest-leaving first.

    As `progtuning_ds.param_groups`, but for groups that exist: each part keeps all settings of the group it comes
    from. Parameters that do not train in stage 0 are left out, because DeepSpeed would move them; groups already laid
    out come back as they are.

    Args:
        groups: groups of a torch optimizer without state, or `[{"params": [...]}]`.
        model: the bare module.
        plan: what trains when.
        blocks: what `discover_blocks(model)` returned.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    last: dict[str, int] = {}
    for stage in plan.stages:
        last.update(dict.fromkeys(blocks.trainable_names(stage, plan.always_train), stage.index))
    first = set(blocks.trainable_names(plan.stages[0], plan.always_train))
    laid: list[dict[str, Any]] = []
    for leaves in range(len(plan.stages) - 1, -1, -1):
        for group in groups:
            members = [p for p in group["params"] if _leaves(names.get(id(p)), first, last) == leaves]
            if members:
                laid.append({**group, "params": members})
    return laid


def _leaves(name: str | None, first: set[str], last: dict[str, int]) -> int | None:
    return last[name] if name in first and name is not None else None
