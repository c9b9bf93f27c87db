"""Quantizes the weights of blocks that have frozen for good, inside a live engine, and makes them dense again.

Owns which weights, in what order, and what happens to DeepSpeed's hold on them. What a quantized layer computes is
``methods.frozen_linear``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from progtuning_ds.blocks import BlockMap
from progtuning_ds.errors import UnsupportedStateError, did_you_mean
from progtuning_ds.methods.frozen_linear import (
    FrozenLinear,
    dense_weight,
    freezable,
    frozen_layers,
    owner,
    quantize,
    restore,
)
from progtuning_ds.on_freeze import KINDS, freezing_blocks, why_not
from progtuning_ds.schedule import Stage, StagePlan
from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.stage3 import Stage3Adapter

KeepExact = Callable[[int, Mapping[str, torch.Tensor]], None]
"""Gets a block and its weights by name, whole, just before they are quantized; called on every rank."""
ReadExact = Callable[[int], Mapping[str, torch.Tensor]]
"""Gives back what it got; called on the first rank alone."""

_WITHOUT_SCALES = ("save_checkpoint", "load_checkpoint", "save_16bit_model")
"""What of the engine reads or writes parameters alone; codes without their scales are no weights."""


class Compression:
    """What ``StageEngine(on_freeze=...)`` does to blocks at planned boundaries.

    Args:
        adapter: of the live engine.
        plan: what trains when.
        blocks: the model's blocks.
        kind: "int8" or "nf4".

    Raises:
        ValueError: if ``kind`` is another word, or the plan or the engine does not allow it; one line.
    """

    def __init__(self, adapter: Adapter, plan: StagePlan, blocks: BlockMap, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"on_freeze must be one of {', '.join(KINDS)}, got {kind!r}{did_you_mean(kind, KINDS)}")
        self.adapter = adapter
        self.plan = plan
        self.kind = kind
        self.keep: KeepExact | None = None
        """Called with each block before it is quantized."""
        self._quantized: set[int] = set()
        self._shapes = freezable(adapter.engine.module, blocks)
        always = blocks.always_names(plan.always_train)
        self._weights = [tuple(n for n in block if n in self._shapes and n not in always) for block in blocks.blocks]
        reason = why_not(
            kind,
            plan,
            [self._shapes[name] for names in self._weights for name in names],
            element=min((adapter.params[n].element_size() for ns in self._weights for n in ns), default=4),
            sharing_ranks=adapter.ranks.world_size if isinstance(adapter, Stage3Adapter) else 1,
            offloads_parameters=_offloads_parameters(adapter.engine),
        ) or self._cut_group(blocks)
        if reason:
            raise ValueError(f"on_freeze must be keep here, got {kind!r}: {reason}")
        if isinstance(adapter, Stage3Adapter):
            adapter.separate_groups()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that are quantized now."""
        return tuple(sorted(self._quantized))

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights that are quantized now."""
        return frozenset(name for block in self._quantized for name in self._weights[block])

    def due(self, stage: Stage) -> tuple[int, ...]:
        """Blocks that freeze for good with ``stage`` and are not quantized yet, lowest first."""
        frozen = freezing_blocks(self.plan, stage.index)
        return tuple(block for block in frozen if block not in self._quantized and self._weights[block])

    def quantize(self, blocks: tuple[int, ...]) -> None:
        """Quantize the weights of ``blocks``, which do not train any more; what they held is released. Collective."""
        for block in blocks:
            names = self._weights[block]
            with self.adapter.whole(names):
                weights = {name: self.adapter.params[name].data for name in names}
                if self.keep is not None:
                    self.keep(block, weights)
                module = self.adapter.engine.module
                codes = {name: quantize(owner(module, name), weights.pop(name), self.kind) for name in names}
            self.adapter.exchange(codes)
            self._quantized.add(block)
            for name in _WITHOUT_SCALES:
                setattr(self.adapter.engine, name, _refusing(name, self.kind))

    def expand(self) -> None:
        """Make every quantized weight dense again, with what its layer computed with; to export. Collective."""
        for block in self.blocks:
            names = self._weights[block]
            layers = dict(self._layers(names))
            with self.adapter.whole(names):
                weights = {name: dense_weight(layer) for name, layer in layers.items()}
            self.adapter.exchange({name: restore(layers[name], weights.pop(name)) for name in names})
        for name in _WITHOUT_SCALES:
            vars(self.adapter.engine).pop(name, None)

    def put_back(self, read: ReadExact) -> None:
        """After ``expand``: give the weights the values they had when they froze. Collective."""
        first = self.adapter.ranks.rank == 0
        for block in self.blocks:
            exact = read(block) if first else {}
            for name in self._weights[block]:
                self.adapter.overwrite(name, exact.get(name))

    def _layers(self, names: tuple[str, ...]) -> Iterator[tuple[str, FrozenLinear]]:
        for name, layer in frozen_layers(self.adapter.engine.module):
            if name in names:
                yield name, layer

    def _cut_group(self, blocks: BlockMap) -> str | None:
        """ZeRO-3 keeps weights of a parameter group in one buffer, which goes only as a whole."""
        if not isinstance(self.adapter, Stage3Adapter):
            return None
        for stage in self.plan.stages[1:]:
            target = set(blocks.trainable_names(stage, self.plan.always_train))
            if any(not target.isdisjoint(group) and not target.issuperset(group) for group in self.adapter.groups()):
                return "under ZeRO-3 it needs groups made for the plan; build them with progtuning_ds.param_groups"
        return None


def _refusing(name: str, kind: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedStateError(
            f"engine.{name} knows nothing of blocks quantized to {kind} (on_freeze): use progtuning_ds.checkpoint, or "
            f"call stages.compression.expand() before"
        )

    return refuse


def _offloads_parameters(engine: Any) -> bool:
    settings = engine._config.zero_config.offload_param
    return settings is not None and getattr(settings.device, "value", settings.device) not in (None, "none")
