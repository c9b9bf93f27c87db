"""Owns a model's parameters as sizes, and how they fall into groups under a plan. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

from progtuning_ds.errors import ConfigError
from progtuning_ds.memory.architecture import Architecture
from progtuning_ds.schedule import Stage, StagePlan


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter.

    Attributes:
        name: canonical name.
        numel: elements.
        component: ``"embeddings"``, the index of a block, or ``"head"``.
        decays: has weight decay, so belongs to another group than one that has none.
        frozen: never trains, such as the base weights under LoRA.
        matrix: (outputs, inputs) of a linear layer's weight that can be quantized once its block has frozen.
        base: the same of one that never trains, which a method may quantize from the start.
    """

    name: str
    numel: int
    component: str | int
    decays: bool = True
    frozen: bool = False
    matrix: tuple[int, int] | None = None
    base: tuple[int, int] | None = None

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether its name fits one of several fnmatch patterns."""
        return any(fnmatchcase(self.name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Group:
    """Parameters of one optimizer group: those that leave after the same stage and share their weight decay."""

    last_stage: int
    decays: bool
    params: tuple[Param, ...]

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(param.numel for param in self.params)

    @cached_property
    def numel(self) -> int:
        """Elements, without padding."""
        return sum(self.numels)


@dataclass(frozen=True)
class ParamTable:
    """All parameters of a model, in model order; tied weights appear once."""

    params: tuple[Param, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        for param in self.params:
            if isinstance(param.component, int) and not 0 <= param.component < self.num_blocks:
                raise ConfigError(f"component must be a block within 0..{self.num_blocks - 1}, got {param}")

    @cached_property
    def numel(self) -> int:
        """Elements of the whole model."""
        return sum(param.numel for param in self.params)

    @cached_property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of all weights that can be quantized once their block has frozen."""
        return tuple(param.matrix for param in self.params if param.matrix is not None)

    def with_adapters(self, shape: Architecture, rank: int) -> ParamTable:
        """Return the table with everything frozen and LoRA adapters on every linear layer of the blocks.

        A layer of ``m x n`` gets ``rank x (m + n)`` elements (arXiv 2106.09685).
        """
        attention, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        mlp = (3 if shape.mlp == "gated" else 2) * (shape.hidden + shape.intermediate)
        ends = 2 * (shape.hidden + attention) + 2 * (shape.hidden + key) + mlp
        base = tuple(replace(param, frozen=True, base=param.matrix) for param in self.params)
        adapters = tuple(Param(f"adapters.{block}", rank * ends, block) for block in range(self.num_blocks))
        return ParamTable(base + adapters, self.num_blocks)

    @cached_property
    def input_shares(self) -> tuple[float, ...]:
        """Of every block, the share of its linear layers' inputs that layers which train read.

        All of it but under adapters, which read the inputs of the layers they are on and leave the others' alone.
        """
        shares = []
        for block in range(self.num_blocks):
            own = [param for param in self.params if param.component == block]
            added = sum(p.matrix[1] for p in own if p.matrix is not None and not p.frozen)
            base = sum(p.base[1] for p in own if p.base is not None)
            shares.append(min(1.0, added / base) if added and base else 1.0)
        return tuple(shares)

    def trains(self, stage: Stage, always_train: tuple[str, ...] = ()) -> tuple[Param, ...]:
        """Return what trains in a stage, in model order; the rule of ``BlockMap.trainable_names``."""
        wanted: set[str | int] = {"head", *stage.trainable_blocks}
        if stage.embeddings:
            wanted.add("embeddings")
        return tuple(
            param
            for param in self.params
            if not param.frozen and (param.component in wanted or param.matches(always_train))
        )

    def groups(self, plan: StagePlan, stage: int = 0) -> tuple[Group, ...]:
        """Return the optimizer groups in a stage, in the order of ``param_groups``.

        A plan that only shrinks drops whole groups of those made for stage 0. Any other plan is counted as if groups
        had been made for the stage alone, which differs in padding only.
        """
        first = 0 if plan.is_shrinking else stage
        last_stage: dict[str, int] = {}
        for later in plan.stages[first:] if plan.is_shrinking else plan.stages[stage : stage + 1]:
            last_stage.update(dict.fromkeys((p.name for p in self.trains(later, plan.always_train)), later.index))
        members: dict[tuple[int, bool], list[Param]] = {}
        for param in self.trains(plan.stages[first], plan.always_train):
            members.setdefault((last_stage[param.name], param.decays), []).append(param)
        return tuple(
            Group(leaves, decays, tuple(members[leaves, decays]))
            for leaves, decays in sorted(members, reverse=True)
            if leaves >= stage
        )
