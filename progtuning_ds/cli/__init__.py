"""Owns the `progtuning` command. May import everything but deepspeed at start, so that planning starts fast."""

from progtuning_ds.cli.app import main

__all__ = ["main"]
