"""Owns the map from parameter names to embeddings, blocks and head. May import schedule and errors; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property

from progtuning_ds.errors import BlockDiscoveryError, ConfigError, did_you_mean
from progtuning_ds.schedule import Stage


@dataclass(frozen=True)
class BlockMap:
    """Which parameters are embeddings, which belong to which block, and which are the head.

    Names are canonical: as `model.named_parameters()` gives them, so a tied weight appears once. Every parameter of
    the model appears in exactly one of `embeddings`, `blocks[b]` and `head`, in model order.

    Attributes:
        path: dotted path of the block stack; encoder-decoders have two, joined by `+`.
        embeddings: what comes before the first block, tied output weights included.
        blocks: parameters of each block, lowest first.
        head: what comes after the last block, such as final norm, pooler and classifier.
        order: all names in model order; the concatenation of the three when not given.
        frozen: names that did not require grad at discovery, such as the base weights under LoRA. They stay frozen in
            every stage; discover blocks before freezing anything that should train later.
    """

    path: str
    embeddings: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    order: tuple[str, ...] = ()
    frozen: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        names = [*self.embeddings, *(name for block in self.blocks for name in block), *self.head]
        if not self.order:
            object.__setattr__(self, "order", tuple(names))
        if len(set(names)) != len(names) or set(names) != set(self.order):
            raise BlockDiscoveryError("blocks must hold every parameter exactly once")
        if not self.frozen <= set(names):
            raise BlockDiscoveryError(f"frozen must name parameters of the model, got {sorted(self.frozen)[:3]}")

    def __len__(self) -> int:
        """Return the number of blocks, L."""
        return len(self.blocks)

    @cached_property
    def _components(self) -> dict[str, str | int]:
        components: dict[str, str | int] = dict.fromkeys(self.embeddings, "embeddings")
        components |= {name: index for index, block in enumerate(self.blocks) for name in block}
        return components | dict.fromkeys(self.head, "head")

    def component_of(self, name: str) -> str | int:
        """Return `"embeddings"`, the block's index or `"head"`; `ConfigError` for a name the model does not have."""
        try:
            return self._components[name]
        except KeyError:
            raise ConfigError(
                f"name must be a parameter of the model, got {name!r}{did_you_mean(name, self.order)}"
            ) from None

    def trainable_names(self, stage: Stage, always_train: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the names that train in `stage`, in model order.

        Args:
            stage: what trains; its blocks must exist.
            always_train: fnmatch patterns of names that train in every stage; each must match a parameter.

        Raises:
            ConfigError: if a pattern matches nothing, or the stage names blocks that the model does not have.
        """
        if stage.trainable_blocks and stage.trainable_blocks[-1] >= len(self):
            raise ConfigError(f"stage.trainable_blocks must be within 0..{len(self) - 1}, got {stage.trainable_blocks}")
        trains: set[str | int] = {"head", *stage.trainable_blocks}
        if stage.embeddings:
            trains.add("embeddings")
        always = self.always_names(always_train)
        return tuple(
            name
            for name in self.order
            if name not in self.frozen and (name in always or self._components[name] in trains)
        )

    def always_names(self, always_train: Sequence[str]) -> frozenset[str]:
        """Return the names that match an `always_train` pattern; `ConfigError` for one that matches nothing."""
        matched: set[str] = set()
        for index, pattern in enumerate(always_train):
            found = [name for name in self.order if fnmatchcase(name, pattern)]
            if not found:
                raise ConfigError(
                    f"always_train[{index}] must match a parameter name, got {pattern!r}"
                    f"{did_you_mean(pattern.strip('*.'), self.order)}"
                )
            matched.update(found)
        return frozenset(matched - self.frozen)
