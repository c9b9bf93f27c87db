"""Errors a user can correct, and the hint that names the nearest valid choice. Standard library only."""

import difflib
from collections.abc import Collection, Iterable


class ConfigError(ValueError):
    """A wrong setting. The message is one line: field, value, what is allowed, nearest valid choice."""


class BlockDiscoveryError(ConfigError):
    """Embeddings, blocks and head of a model cannot be told apart, or its blocks cannot freeze one by one."""


def require_choice(field: str, value: object, allowed: Collection[str]) -> None:
    """Raise `ConfigError` naming `field` and the nearest choice unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{field} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Return `"; did you mean 'x'?"` for the choice nearest to `value`, or `""` where none is near."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class UnsupportedDeepSpeedError(RuntimeError):
    """This DeepSpeed, or a feature of it in use, cannot be retargeted; the message names what."""


class UnsupportedStateError(RuntimeError):
    """The optimizer keeps state that cannot be cut and moved; the message names it."""


class StageTransitionError(RuntimeError):
    """A transition was asked for at a moment or in a way that would lose or misplace state. Nothing was changed."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or cannot be used; the message is one line that names it and the reason."""
