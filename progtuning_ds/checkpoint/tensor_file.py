"""Writes tensors in the safetensors format, checked and synced, and reads slices of them. Knows torch; no deepspeed.

The format is a length, a JSON header and raw bytes (https://github.com/huggingface/safetensors). It is written here
and not by the library so that bytes go from a device to the file one tensor at a time, are hashed on the way, reach
the disk before anyone is told, and a full disk is an `OSError`. It is read here too, slice by slice into its own
memory: the library would map whole files into the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from progtuning_ds.checkpoint.manifest import FileSeal
from progtuning_ds.errors import CheckpointError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_PIECE_BYTES = 32 * 2**20
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileSeal:
    """Write tensors to a new file and sync it; host memory holds one piece of one tensor at a time.

    Raises:
        OSError: if the disk is full or the folder cannot be written to.
        TypeError: for a dtype the format does not know.
    """
    parts = _parts(tensors)
    with path.open("xb") as file:
        seal = _run_through(parts, file.write)
        file.flush()
        os.fsync(file.fileno())
    return seal


def seal_tensors(tensors: Mapping[str, torch.Tensor]) -> FileSeal:
    """Return the seal of the file that `write_tensors` would write, without writing it."""
    return _run_through(_parts(tensors), lambda piece: None)


def file_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the file that `write_tensors` would write."""
    return len(_header(tensors)) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _run_through(parts: Iterator[Any], take: Callable[[Any], object]) -> FileSeal:
    digest, size = hashlib.sha256(), 0
    for part in parts:
        take(part)
        digest.update(part)
        size += len(part)
    return FileSeal(size, digest.hexdigest())


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """The bytes of a file, one part after the other; a dtype that cannot be saved is found before the first."""
    header = _header(tensors)
    return chain([header], chain.from_iterable(_pieces(tensor) for tensor in tensors.values()))


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """What a file begins with: the length of the JSON text, and the text, padded."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} cannot be saved: {tensor.dtype} is no type of safetensors")
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of a tensor, a bounded number at a time, without a copy where they are in host memory already."""
    flat = tensor.detach().contiguous().view(-1)
    step = max(1, _PIECE_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Opened:
    """A file, its header, and where its bytes begin."""

    file: BufferedReader
    header: dict[str, Any]
    begin: int


class TensorReader:
    """Reads slices of the tensors of several files, whose checksums are known to be right.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, _Opened] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def dtype(self, file: str, name: str) -> torch.dtype:
        """The type of a tensor."""
        return _TYPES[self._open(file).header[name]["dtype"]]

    def read(self, file: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements `start` to `stop` of a flattened tensor; without `stop` all of it, in its own shape."""
        opened = self._open(file)
        entry = opened.header[name]
        dtype, (first, end) = _TYPES[entry["dtype"]], entry["data_offsets"]
        whole = (end - first) // dtype.itemsize
        count = whole - start if stop is None else stop - start
        if not 0 <= start <= start + count <= whole:
            raise CheckpointError(f"{file} has {whole} elements of {name!r}, asked for {start} to {start + count}")
        values = torch.empty(count, dtype=dtype)
        opened.file.seek(opened.begin + first + start * dtype.itemsize)
        if count and opened.file.readinto(values.view(torch.uint8).numpy().data) != count * dtype.itemsize:
            raise CheckpointError(f"{self._folder / file} ends in the middle of {name!r}")
        return values if stop is not None else values.view(entry["shape"])

    def names(self, file: str, prefix: str) -> list[str]:
        """Names of the tensors of a file that begin with `prefix`."""
        return [name for name in self._open(file).header if name.startswith(prefix)]

    def _open(self, file: str) -> _Opened:
        if file not in self._files:
            handle = self._stack.enter_context((self._folder / file).open("rb"))
            size = int.from_bytes(handle.read(8), "little")
            self._files[file] = _Opened(handle, json.loads(handle.read(size)), 8 + size)
        return self._files[file]
