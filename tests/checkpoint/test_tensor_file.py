"""Tensor files are what safetensors reads and writes, whole and in slices."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from progtuning_ds.checkpoint.tensor_file import TensorReader, write_tensors
from progtuning_ds.errors import CheckpointError

TENSORS = {
    "a matrix": torch.arange(24, dtype=torch.float32).view(4, 6),
    "turned": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "bf16": torch.randn(7, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "a number": torch.tensor(3, dtype=torch.int64),
    "none": torch.empty(0, dtype=torch.float16),
}


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    seal = write_tensors(tmp_path / "file.safetensors", TENSORS)
    data = (tmp_path / "file.safetensors").read_bytes()
    assert (seal.size, seal.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_what_the_library_writes_is_read_here(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "file.safetensors")
    with TensorReader(tmp_path) as reader:
        for name, tensor in TENSORS.items():
            whole = reader.read("file.safetensors", name)
            assert whole.dtype == reader.dtype("file.safetensors", name) == tensor.dtype
            assert torch.equal(whole, tensor), name
        assert torch.equal(reader.read("file.safetensors", "a matrix", 5, 9), torch.arange(5.0, 9.0))
        with pytest.raises(CheckpointError, match="has 24 elements of 'a matrix', asked for 20 to 30"):
            reader.read("file.safetensors", "a matrix", 20, 30)


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file.safetensors", {})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file.safetensors", TENSORS)
