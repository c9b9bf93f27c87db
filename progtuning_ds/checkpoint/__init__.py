"""Checkpoints of a live stage engine: made whole or not at all, loaded on any number of ranks, never unpickled.

The format is this project's own: safetensors and JSON, one pair of files per rank, said in spans of parameters.
"""

from progtuning_ds.checkpoint.background import BackgroundSave
from progtuning_ds.checkpoint.loading import Checkpoint, load_checkpoint, newest_sound, open_checkpoint
from progtuning_ds.checkpoint.saving import save_checkpoint
from progtuning_ds.checkpoint.store import CheckpointStore

__all__ = [
    "BackgroundSave",
    "Checkpoint",
    "CheckpointStore",
    "load_checkpoint",
    "newest_sound",
    "open_checkpoint",
    "save_checkpoint",
]
