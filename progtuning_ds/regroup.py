"""From "these parameters train from now on" to one decision per parameter group.

Owns group plans as plain frozen values; imports the standard library only. Executed by ``progtuning_ds.zero``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupTarget:
    """One parameter group after a retarget.

    Attributes:
        names: its parameters, in buffer order.
        source: index of the group it comes from, or None for parameters that join with fresh state.
        origin: identity of the group whose hyper-parameters (lr, weight decay, ...) it has; it outlives the group.
        keep: True if the source group stays as it is, buffers included.
    """

    names: tuple[str, ...]
    source: int | None
    origin: int
    keep: bool


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """All parameter groups after a retarget, and the names that leave or join."""

    groups: tuple[GroupTarget, ...]
    leaving: tuple[str, ...]
    joining: tuple[str, ...]

    @property
    def only_drops(self) -> bool:
        """True if whole groups are dropped and nothing else happens: no byte has to move."""
        return all(group.keep for group in self.groups)


def plan_groups(
    groups: Sequence[Sequence[str]],
    origins: Sequence[int],
    target: Iterable[str],
    origin_of: Mapping[str, int],
) -> GroupPlan:
    """Decide what becomes of each parameter group when exactly ``target`` trains from now on.

    Groups that survive whole are kept, groups that lose members are compacted, groups that lose all are dropped;
    parameters that join are appended in groups of their own, one per origin, because their optimizer state starts
    anew. The order of the survivors is kept.

    Args:
        groups: names in each current group.
        origins: identity of each current group.
        target: names that train from now on.
        origin_of: for each joining name, the identity of the group whose hyper-parameters it takes.

    Raises:
        ValueError: if nothing would be left to train.
    """
    wanted = dict.fromkeys(target)
    if not wanted:
        raise ValueError("target must name at least one parameter to train, got none")
    current = [name for group in groups for name in group]
    held = set(current)
    targets: list[GroupTarget] = []
    for index, (group, origin) in enumerate(zip(groups, origins, strict=True)):
        kept = tuple(name for name in group if name in wanted)
        if kept:
            targets.append(GroupTarget(kept, index, origin, keep=len(kept) == len(group)))
    joining = tuple(name for name in wanted if name not in held)
    for origin in sorted({origin_of[name] for name in joining}):
        names = tuple(name for name in joining if origin_of[name] == origin)
        targets.append(GroupTarget(names, None, origin, keep=False))
    return GroupPlan(tuple(targets), tuple(name for name in current if name not in wanted), joining)


def fingerprint(*values: object) -> int:
    """A 63-bit digest of plain values, equal on all ranks that hold equal values."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
