"""bf16 weights without an fp32 master: exact split into weight and remainder, and stochastic rounding. Torch alone.

Bits are handled as int32 and int64, because PyTorch has no arithmetic on unsigned integers. The Triton kernels do the
same on unsigned ones (``device.py``); both give the same bits.
"""

from __future__ import annotations

import torch

_32_BITS = 0xFFFFFFFF
KEY_STEP = 0x9E3779B9
"""Odd, so that the keys of 2**32 successive steps differ."""


def split(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write fp32 ``master`` [n] as bf16 ``weight`` [n] and int16 ``remainder`` [n], losing no bit.

    The weight is the master rounded to nearest. Ties go away from zero: rounded to even they could not be told
    apart afterwards, as 2**32 masters do not fit in pairs of an evenly rounded weight and 16 bits. So the weight
    differs from ``master.bfloat16()`` in half of the exact ties, one element in 2**17 on average.
    """
    bits = master.view(torch.int32)
    upper = torch.where(master.isnan(), (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    weight.view(torch.int16).copy_(upper)
    remainder.copy_(bits - (upper << 16))


def join(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Return the fp32 master [n] that `split` wrote as bf16 ``weight`` and int16 ``remainder``."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def round_stochastically(master: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round fp32 [n] to bf16 [n], up in magnitude with the probability that keeps the mean.

    Args:
        master: finite values; NaN stays NaN.
        noise: int64 [n], uniform in 0..65535.
    """
    bits = master.view(torch.int32)
    upper = torch.where(master.isnan(), (bits >> 16) | 0x40, (bits + noise.to(torch.int32)) >> 16)
    return upper.to(torch.int16).view(torch.bfloat16)


def noise(start: int, stop: int, key: int, device: torch.device) -> torch.Tensor:
    """Return int64 [stop - start] in 0..65535 that depends on an element's number and on ``key`` (32 bits) alone."""
    index = torch.arange(start, stop, dtype=torch.int64, device=device) & _32_BITS
    return _mix((_mix(index) + key) & _32_BITS) & 0xFFFF


def noise_key(seed: int, updates: int) -> int:
    """Return the key of a step, 32 bits, from the run's seed and the number of updates before it."""
    return (seed + updates * KEY_STEP) & _32_BITS


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers, one to one: Wellons' `lowbias32`, found by search for low bias (hash-prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _32_BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)
