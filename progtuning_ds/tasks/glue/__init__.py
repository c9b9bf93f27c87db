"""GLUE: its nine tasks, official files, metrics and submissions. Imports torch; no deepspeed."""

from progtuning_ds.tasks.glue.task import GlueTask

__all__ = ["GlueTask"]
