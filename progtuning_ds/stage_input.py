"""Owns reading the stage lengths and block lists that users write. Standard library and errors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from numbers import Rational
from typing import Any, TypeAlias

from progtuning_ds.errors import ConfigError, did_you_mean, require_choice

# Floats are read as they are written: 0.1 is a tenth.
Length: TypeAlias = Rational | float | int

LENGTH_UNITS = ("steps", "epochs", "fractions")
CUSTOM_STAGE_KEYS = ("blocks", "steps", "embeddings")
# Decimal fractions such as 0.333 are seldom exact.
_FRACTION_TOLERANCE = Fraction(1, 100)


def stage_ends(
    lengths: Sequence[Length], num_stages: int, total_steps: int, unit: str, steps_per_epoch: int | None
) -> list[int]:
    """Turn stage lengths into the end step of every stage.

    What is rounded is the cumulated length, so that errors do not add up.
    """
    require_choice("length_unit", unit, LENGTH_UNITS)
    if isinstance(lengths, str) or not isinstance(lengths, Sequence) or len(lengths) != num_stages:
        count = len(lengths) if isinstance(lengths, Sequence) else lengths
        raise ConfigError(f"lengths must hold one length for each of the {num_stages} stages, got {count}")
    if unit == "epochs":
        require_positive_int("steps_per_epoch (needed for lengths in epochs)", steps_per_epoch)
    exact = [_exact_length(index, length, unit) for index, length in enumerate(lengths)]
    run = {"steps": total_steps, "epochs": Fraction(total_steps, steps_per_epoch or 1), "fractions": 1}[unit]
    tolerance = {"steps": 0, "epochs": Fraction(1, 2 * (steps_per_epoch or 1)), "fractions": _FRACTION_TOLERANCE}[unit]
    if abs(sum(exact) - run) > tolerance:
        raise ConfigError(
            f"lengths must add up to {float(run):g}{' ' + unit if unit != 'fractions' else ''}, "
            f"got {' + '.join(f'{float(length):g}' for length in exact)} = {float(sum(exact)):g}"
        )
    ends = [round(end * total_steps / sum(exact)) for end in accumulate(exact)]
    for index, (start, end) in enumerate(pairwise([0, *ends])):
        if end <= start:
            raise ConfigError(
                f"lengths[{index}] must give stage {index} at least one step, got {float(exact[index]):g} {unit} "
                f"of a run of {total_steps} steps"
            )
    return ends


def read_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return name patterns as a tuple; `ConfigError` for a single text, which would be taken letter by letter."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"always_train must be a sequence of parameter name patterns, got {patterns!r}")
    return tuple(patterns)


def _exact_length(index: int, length: Length, unit: str) -> Fraction:
    if isinstance(length, bool) or not isinstance(length, (Rational, float)) or not 0 < float(length) < float("inf"):
        raise ConfigError(f"lengths[{index}] must be a positive number of {unit}, got {length!r}")
    exact = Fraction(repr(float(length))) if isinstance(length, float) else Fraction(length)
    if unit == "steps" and exact.denominator != 1:
        raise ConfigError(f"lengths[{index}] must be a whole number of steps, got {length!r}")
    return exact


def check_custom_stage(field: str, entry: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless `entry` has the keys and types of a stage written by hand."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{field} must be a mapping with {', '.join(CUSTOM_STAGE_KEYS)}, got {entry!r}")
    for key in entry:
        if key not in CUSTOM_STAGE_KEYS:
            raise ConfigError(
                f"{field} has the unknown key {key!r}, allowed are {', '.join(CUSTOM_STAGE_KEYS)}"
                f"{did_you_mean(key, CUSTOM_STAGE_KEYS)}"
            )
    for key in ("blocks", "steps"):
        if key not in entry:
            raise ConfigError(f"{field}.{key} is missing, got only {', '.join(map(str, entry)) or 'nothing'}")
    require_positive_int(f"{field}.steps", entry["steps"])
    if not isinstance(entry.get("embeddings", True), bool):
        raise ConfigError(f"{field}.embeddings must be true or false, got {entry['embeddings']!r}")


def parse_blocks(field: str, value: object, num_blocks: int) -> tuple[int, ...]:
    """Read block indices or text such as `"0,4-11"` into a sorted tuple."""
    if isinstance(value, str):
        indices = _parse_block_text(field, value.strip(), num_blocks)
    elif isinstance(value, (Sequence, range, set, frozenset)):
        indices = list(value)
    else:
        raise ConfigError(f"{field} must be a list of block indices or text such as '4-11', got {value!r}")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_blocks:
            raise ConfigError(f"{field} must hold blocks within 0..{num_blocks - 1}, got {index!r}")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"{field} must name every block once, got {value!r}")
    return tuple(sorted(indices))


def _parse_block_text(field: str, text: str, num_blocks: int) -> list[int]:
    if text in ("all", "none"):
        return list(range(num_blocks)) if text == "all" else []
    indices: list[int] = []
    for item in text.split(","):
        first, dash, last = (piece.strip() for piece in item.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"{field} must be like '4-11', '0,4-11', 'all' or 'none', got {text!r}")
        # The bound keeps a typo such as '0-1000000000' from building a huge list before it is refused.
        indices += range(int(first), min(int(last), num_blocks) + 1) if dash else [int(first)]
    return indices


def require_positive_int(field: str, value: object) -> None:
    """Raise `ConfigError` naming `field` unless `value` is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{field} must be a positive whole number, got {value!r}")
