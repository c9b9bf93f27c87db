"""Progtuning inside a Hugging Face `Trainer`, with DeepSpeed or without. Imports deepspeed only where it trains."""

from progtuning_ds.trainer.callback import ProgtuningCallback

__all__ = ["ProgtuningCallback"]
