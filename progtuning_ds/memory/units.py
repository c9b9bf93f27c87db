"""Owns sizes of memory as people write them. Standard library and errors only."""

from __future__ import annotations

import re

from progtuning_ds.errors import ConfigError, did_you_mean

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_BY_FOLDED = {name.casefold(): size for name, size in _UNITS.items()} | {
    prefix.casefold(): 1024**power for power, prefix in enumerate("KMGT", start=1)
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(field: str, value: object) -> int:
    """Read a number of bytes: an integer, or text such as `24GB` (10^9), `80GiB` (2^30), `512MiB` or `24G` (2^30).

    Raises:
        ConfigError: if it is neither, or not positive.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{field} must be a positive size such as 24GB, 80GiB or 512MiB, got {value!r}")
    number, unit = match.groups()
    if unit and unit.casefold() not in _BY_FOLDED:
        raise ConfigError(
            f"{field} must have one of the units {', '.join(_UNITS)}, got {value!r}{did_you_mean(unit, _UNITS)}"
        )
    size = int(float(number) * _BY_FOLDED.get(unit.casefold(), 1))
    if size < 1:
        raise ConfigError(f"{field} must be a positive size such as 24GB, 80GiB or 512MiB, got {value!r}")
    return size


def format_bytes(count: float) -> str:
    """Write bytes with a binary unit and three digits or so: `23.4 GiB`, `512 B`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
