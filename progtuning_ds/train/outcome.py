"""How a run can end, and the exit code of each way. No torch, no deepspeed."""

from __future__ import annotations

from progtuning_ds.errors import CheckpointError, ConfigError, UnsupportedDeepSpeedError

DONE = 0
CRASHED = 1
USER_ERROR = 2
GUARD = 3
CHECKPOINT = 4
PEER_LOST = 5
MEMORY = 6
PREEMPTED = 75
"""`EX_TEMPFAIL` of sysexits.h: try the same command again."""


class RunEndError(Exception):
    """A run ends early, on all ranks at the same step; the message is one line for the user."""

    code = CRASHED


class PreemptedError(RunEndError):
    """A signal asked the run to stop; its state is saved."""

    code = PREEMPTED


class GuardStopError(RunEndError):
    """Training has gone wrong; the message says what to look at."""

    code = GUARD


class MemoryBudgetError(RunEndError):
    """The next stage would need more than the budget; the message says how much, for what, and what would help."""

    code = MEMORY


class OutOfMemoryEndError(Exception):
    """Memory has run out on this rank, while others may be waiting for it; the message is one line for the user."""

    code = MEMORY


EXPECTED = (ConfigError, CheckpointError, UnsupportedDeepSpeedError, RunEndError)
"""What all ranks raise together, and what the user is told in one line."""
