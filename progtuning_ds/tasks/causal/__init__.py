"""Causal language modelling: plain text, packed or not, and conversations. Imports torch; no deepspeed."""

from progtuning_ds.tasks.causal.task import CausalTask

__all__ = ["CausalTask"]
