"""Writes tensors in the safetensors format, checked and synced, and reads slices of them. Knows torch; no deepspeed.

The format is a length, a JSON header and raw bytes (https://github.com/huggingface/safetensors). It is written here
and not by the library so that bytes go from a device to the file one tensor at a time, are hashed on the way, reach
the disk before anyone is told, and a full disk is an `OSError`. It is read by the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from progtuning_ds.checkpoint.manifest import FileSeal

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
_PIECE_BYTES = 32 * 2**20
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileSeal:
    """Write tensors to a new file and sync it; host memory holds one piece of one tensor at a time.

    Raises:
        OSError: if the disk is full or the folder cannot be written to.
        TypeError: for a dtype the format does not know.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} cannot be saved: {tensor.dtype} is no type of safetensors")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
            size += len(part)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileSeal(size, digest.hexdigest())


def _pieces(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of a tensor, a bounded number at a time, without a copy where they are in host memory already."""
    flat = tensor.detach().contiguous().view(-1)
    step = max(1, _PIECE_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data


class TensorReader:
    """Reads slices of the tensors of several files; each file is mapped, never loaded whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, file: str, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements `start` to `stop` of a 1-D tensor, or a whole tensor of any shape."""
        opened = self._open(file)
        return opened.get_tensor(name) if stop is None else opened.get_slice(name)[start:stop]

    def names(self, file: str, prefix: str) -> list[str]:
        """Names of the tensors of a file that begin with `prefix`."""
        return [name for name in self._open(file).keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(str(self._folder / file), framework="pt"))
        return self._files[file]
