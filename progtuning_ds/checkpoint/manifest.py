"""The manifest of a checkpoint: what files it has, their sizes and checksums, and what it is of.

Standard library only. A checkpoint without a manifest that fits is none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from progtuning_ds.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 2
_READABLE = (1, 2)  # 2: weights that are settled are in files of their own
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class FileSeal:
    """What a file must be: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done when it was made.
        about: what it is of (world size, ZeRO stage, versions, metrics, ...), plain JSON values.
        files: the seal of every other file.
    """

    step: int
    about: Mapping[str, Any]
    files: Mapping[str, FileSeal]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest; it carries a checksum of itself."""
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "about": dict(manifest.about),
        "files": {name: asdict(seal) for name, seal in manifest.files.items()},
    }
    write_json(folder / MANIFEST, {**body, "sha256": _own_sum(body)})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: one line that names the checkpoint and what is wrong: none there, damaged, or of a version
            of this program that this one does not know.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        own = body.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} cannot be read") from error
    if own != _own_sum(body):
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} does not have its own checksum")
    if body.get("format") not in _READABLE:
        raise CheckpointError(f"checkpoint {folder} has format {body.get('format')}, this version reads up to {FORMAT}")
    files = {name: FileSeal(**seal) for name, seal in body["files"].items()}
    return Manifest(body["step"], body["about"], files)


def problem_with(folder: Path, name: str, seal: FileSeal) -> str | None:
    """What is wrong with one file of a checkpoint, in words, or None; reads the whole file."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != seal.size:
        return f"{name} has {path.stat().st_size} bytes instead of {seal.size}"
    try:
        return None if checksum(path) == seal.sha256 else f"{name} does not have its checksum"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> FileSeal:
    """Write a JSON file and sync it."""
    return write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as the text of a JSON file."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def write_bytes(path: Path, data: bytes) -> FileSeal:
    """Write a file and sync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileSeal(len(data), hashlib.sha256(data).hexdigest())


def _own_sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
