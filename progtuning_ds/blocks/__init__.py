"""Owns what embeddings, blocks and head of a model are, and the only setter of requires_grad; no deepspeed."""

from progtuning_ds.blocks.block_map import BlockMap
from progtuning_ds.blocks.discovery import discover_blocks
from progtuning_ds.blocks.parameters import (
    component_counts,
    full_numel,
    full_shape,
    let_backward_stop,
    persistent_buffers,
    set_trainable,
)

__all__ = [
    "BlockMap",
    "component_counts",
    "discover_blocks",
    "full_numel",
    "full_shape",
    "let_backward_stop",
    "persistent_buffers",
    "set_trainable",
]
