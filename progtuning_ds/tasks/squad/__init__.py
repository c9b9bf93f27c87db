"""SQuAD v1.1 and v2.0: answers found in a context. Imports torch; no deepspeed."""

from progtuning_ds.tasks.squad.task import SquadTask

__all__ = ["SquadTask"]
