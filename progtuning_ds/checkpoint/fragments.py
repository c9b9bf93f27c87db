"""Where in the files of a checkpoint the elements of a parameter are. Standard library and errors only.

A checkpoint holds what each rank held, span by span. Whoever wants some elements of a parameter, on however many
ranks and under whatever ZeRO stage, asks here which slices of which tensors they are.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from progtuning_ds.errors import CheckpointError

WEIGHTS, MASTER = "weights", "master"
"""Kinds every parameter may have; the others are the optimizer's own names, such as `exp_avg`."""
TENSORS = ".safetensors"


def codes_of(kind: str) -> str:
    """The kind of state that is not itself laid out like its master, but whose codes may be: 8-bit blocks."""
    return f"codes of {kind}"


def settled_file(file: str, stage: int | str) -> str:
    """Name of the file, beside a rank's tensor file, of its weights that are settled from a stage on."""
    return f"{file.removesuffix(TENSORS)}.settled-{stage}{TENSORS}"


@dataclass(frozen=True, slots=True, order=True)
class Fragment:
    """Elements `start` to `start + numel` of a flattened parameter, `offset` elements into a tensor of a file."""

    start: int
    numel: int
    file: str
    tensor: str
    offset: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `start` to `stop` of a tensor of a file, wanted `at` elements into the target."""

    file: str
    tensor: str
    start: int
    stop: int
    at: int


@dataclass
class Fragments:
    """All fragments of a checkpoint, by kind and parameter."""

    _held: dict[tuple[str, str], list[Fragment]] = field(default_factory=dict)
    _kinds: dict[str, set[str]] = field(default_factory=dict)

    def add(self, kind: str, param: str, fragment: Fragment) -> None:
        """Note where elements of a parameter are."""
        insort(self._held.setdefault((kind, param), []), fragment)
        self._kinds.setdefault(param, set()).add(kind)

    def kinds(self, param: str) -> frozenset[str]:
        """What is held of a parameter."""
        return frozenset(self._kinds.get(param, ()))

    def slices(self, kind: str, param: str, start: int, numel: int) -> list[Slice]:
        """Return what together makes up elements `start` to `start + numel` of a parameter, each exactly once.

        Raises:
            CheckpointError: if an element is nowhere.
        """
        held = self._held.get((kind, param), [])
        found: list[Slice] = []
        position, end = start, start + numel
        index = max(0, bisect_right(held, position, key=lambda fragment: fragment.start) - 1)
        while position < end:
            if index == len(held) or held[index].start > position:
                raise CheckpointError(f"{kind} of {param!r} is incomplete: element {position} is in no file")
            one = held[index]
            stop = min(end, one.start + one.numel)
            if stop > position:
                first = one.offset + position - one.start
                found.append(Slice(one.file, one.tensor, first, first + stop - position, position - start))
                position = stop
            index += 1
        return found


def read_fragments(rank_files: Iterable[tuple[str, Mapping[str, Any]]]) -> Fragments:
    """Collect the fragments of all ranks.

    Args:
        rank_files: for each rank the name of its tensor file, and its description as `snapshot` made it.
    """
    fragments = Fragments()
    for file, described in rank_files:
        weights = {file: described["weights"]}
        for stage, rows in described.get("settled", {}).items():  # format 1 had none
            weights[settled_file(file, stage)] = rows
        for name, rows in weights.items():
            for tensor, param, start, numel in rows:
                fragments.add(WEIGHTS, param, Fragment(start, numel, name, tensor, 0))
        for buffer in described["buffers"]:
            codes = {codes_of(key): tensor for key, tensor in buffer.get("opaque", {}).items()}
            for kind, tensor in {**buffer["kinds"], **codes}.items():
                for param, start, numel, offset in buffer["spans"]:
                    fragments.add(kind, param, Fragment(start, numel, file, tensor, offset))
    return fragments
