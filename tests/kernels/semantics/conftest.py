"""Where the same tests run: plain implementations, Triton's interpreter (in a process of its own), and GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Target:
    """An implementation of the step on a device."""

    impl: str
    device: str

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}"


def targets() -> list[Target]:
    if INTERPRETED:
        return [Target("triton", "cpu")]
    plain = [Target("reference", "cpu"), Target("fused_cpu", "cpu")]
    return [*plain, Target("reference", "cuda"), Target("triton", "cuda")] if torch.cuda.is_available() else plain


EXACT = [target for target in targets() if target.impl != "fused_cpu"]
"""Implementations that give the reference's bits and have every variant."""


@pytest.fixture(params=targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(params=EXACT, ids=str)
def exact(request: pytest.FixtureRequest) -> Target:
    return request.param
