"""Owns the layout of optimizer parameter groups for a plan. May import torch, schedule and blocks; no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from progtuning_ds.blocks import BlockMap, full_shape, let_backward_stop, set_trainable
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import StagePlan


def param_groups(
    model: nn.Module,
    plan: StagePlan,
    blocks: BlockMap,
    weight_decay: float = 0.0,
    *,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Group the parameters of stage 0 by when they leave, so that a planned boundary drops the tail of the groups.

    Every parameter that trains in stage 0 is in one group, together with those that train for the last time in the
    same stage and share its weight decay. Groups are ordered latest-leaving first: `always.decay`,
    `always.no_decay`, ..., `part1.decay`, `part1.no_decay`, `part0.decay`, `part0.no_decay`, where `partN` leaves
    after stage N. Empty groups are left out. Parameters that do not train in stage 0 are in no group.

    Also makes the model ready for stage 0: exactly the parameters of stage 0 require grad, because DeepSpeed looks at
    that when it builds an engine, and where embeddings freeze, backward can stop above them (`let_backward_stop`; so
    enable gradient checkpointing before).

    Args:
        model: the bare module; may be partitioned by ZeRO-3.
        plan: what trains when.
        blocks: what `discover_blocks(model)` returned.
        weight_decay: decay of the groups that decay; the others have 0.
        no_decay: fnmatch patterns of names that do not decay. `None` means biases and norm weights, which are the
            parameters with fewer than two dimensions.

    Returns:
        A list of `{"params": list[nn.Parameter], "weight_decay": float, "name": str}` for `deepspeed.initialize` or
        a torch optimizer.

    Raises:
        ConfigError: if the plan is for another number of blocks, if nothing trains in stage 0, or if embeddings
            freeze under reentrant checkpointing.
    """
    if plan.num_blocks != len(blocks):
        raise ConfigError(f"plan.num_blocks must be {len(blocks)} as the model's, got {plan.num_blocks}")
    last_stage: dict[str, int] = {}
    for stage in plan.stages:
        last_stage.update(dict.fromkeys(blocks.trainable_names(stage, plan.always_train), stage.index))
    first_names = blocks.trainable_names(plan.stages[0], plan.always_train)
    if not first_names:
        raise ConfigError("plan must train something in stage 0, got no parameter that requires grad")
    set_trainable(model, first_names)
    free_backward(model, plan, blocks)

    parameters = dict(model.named_parameters())
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name in first_names:
        decays = _decays(name, parameters[name], no_decay)
        members.setdefault((last_stage[name], decays), []).append(parameters[name])
    end = len(plan.stages) - 1
    return [
        {
            "params": members[leaves, decays],
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{'always' if leaves == end else f'part{leaves}'}.{'decay' if decays else 'no_decay'}",
        }
        for leaves, decays in sorted(members, reverse=True)
    ]


def free_backward(model: nn.Module, plan: StagePlan, blocks: BlockMap) -> None:
    """Let backward stop at the lowest trainable block wherever `plan` freezes the embeddings (`let_backward_stop`)."""
    if not all(stage.embeddings for stage in plan.stages) or blocks.frozen.issuperset(blocks.embeddings):
        let_backward_stop(model)


def _decays(name: str, parameter: nn.Parameter, no_decay: Sequence[str] | None) -> bool:
    if no_decay is None:
        return len(full_shape(parameter)) >= 2
    return not any(fnmatchcase(name, pattern) for pattern in no_decay)
