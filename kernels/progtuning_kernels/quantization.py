"""8-bit block-wise state as bitsandbytes keeps it: its two dynamic maps, and decoding and encoding. Torch alone.

Both maps follow `create_dynamic_map` of bitsandbytes (``functional.py``; Dettmers, arXiv 1511.04561 and 2110.02861):
seven decades down from 1, each cut into twice as many equal bins as the one below it; a code stands for the middle of
its bin. One code is 0, the last one 1. The signed map has 2**i bins a decade and mirrors them, the unsigned 2**(i+1).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from progtuning_kernels.buffers import STATE_BLOCK

DECADES = 7
SMALLEST_SCALE = 2.0**-126
"""Below it, where 1 / scale could overflow, a block of state is encoded as zeros."""


@lru_cache(maxsize=8)
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return what each of 256 codes stands for: fp32 [256], ascending, in -1..1 or 0..1."""
    magnitudes: list[float] = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        magnitudes += (10 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    values = [*magnitudes, *((-x for x in magnitudes) if signed else ()), 0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def decode(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return fp32 [n] from uint8 codes [n] and one fp32 scale per 256 of them [ceil(n / 256)]."""
    scales = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]
    return dynamic_map(signed, codes.device)[codes.long()] * scales


def encode(values: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> None:
    """Write fp32 ``values`` [n] as nearest uint8 ``codes`` [n] with scales ``absmax`` [ceil(n / 256)]."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    largest = blocks.abs().amax(dim=1)
    absmax.copy_(largest)
    inverse = torch.where(largest >= SMALLEST_SCALE, 1 / largest, torch.zeros_like(largest))
    table = dynamic_map(signed, values.device)
    middles = (table[:-1].double() + table[1:].double()) / 2
    nearest = torch.bucketize((blocks * inverse[:, None]).double(), middles)
    codes.copy_(nearest.view(-1)[: values.numel()])
