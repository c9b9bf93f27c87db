"""Progtuning on live DeepSpeed engines."""

__version__ = "0.1.0.dev0"
