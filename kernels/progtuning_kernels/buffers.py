"""What one step reads and writes for a flat stretch of parameters. Imports torch alone, and no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from progtuning_kernels.segments import Segment

STATE_BLOCK = 256
"""Elements that share one scale in 8-bit state; bitsandbytes' block size for its block-wise optimizers."""

WEIGHT_DTYPES = (torch.bfloat16, torch.float16)
GRADIENT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class FlatBuffer:
    """Parameters that lie one after the other, and their state; every tensor is 1-D, contiguous and on one device.

    Where the weights' full precision is kept decides the variant:

    - ``master``: an fp32 master; ``weight``, if given, receives its bf16 or fp16 rounding;
    - ``remainder``: the low 16 bits of the master, whose high bits are the bf16 ``weight``;
    - neither: the bf16 ``weight`` is all there is, and is rounded stochastically.

    Raises:
        ValueError: a tensor of another shape, dtype or device, or a combination that is none of the above.
    """

    segments: tuple[Segment, ...]
    exp_avg: torch.Tensor
    """fp32 [n], or uint8 [n] codes of bitsandbytes' signed dynamic map."""
    exp_avg_sq: torch.Tensor
    """fp32 [n], or uint8 [n] codes of bitsandbytes' unsigned dynamic map."""
    weight: torch.Tensor | None = None
    """bf16 or fp16 [n]."""
    master: torch.Tensor | None = None
    """fp32 [n]."""
    remainder: torch.Tensor | None = None
    """int16 [n]: the master's bits minus those of ``weight`` moved up 16 places."""
    absmax: torch.Tensor | None = None
    """fp32 [ceil(n / 256)]: scales of 8-bit ``exp_avg``."""
    absmax_sq: torch.Tensor | None = None
    """fp32 [ceil(n / 256)]: scales of 8-bit ``exp_avg_sq``."""

    def __post_init__(self) -> None:
        if self.master is not None and self.remainder is not None:
            raise ValueError("remainder must be None where there is a master, got both")
        if self.master is None and (self.weight is None or self.weight.dtype != torch.bfloat16):
            kind = None if self.weight is None else self.weight.dtype
            raise ValueError(f"weight must be torch.bfloat16 where there is no master, got {kind}")
        state = torch.uint8 if self.exp_avg.dtype == torch.uint8 else torch.float32
        self._require("exp_avg", state)
        self._require("exp_avg_sq", state)
        self._require("weight", *WEIGHT_DTYPES)
        self._require("master", torch.float32)
        self._require("remainder", torch.int16)
        scales = -(-self.numel // STATE_BLOCK)
        for name in ("absmax", "absmax_sq"):
            if (getattr(self, name) is not None) != self.eight_bit:
                raise ValueError(f"{name} must be given with 8-bit state and only then, got {getattr(self, name)!r}")
            self._require(name, torch.float32, numel=scales)
        if self.eight_bit:
            self._require_whole_blocks()

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return self.exp_avg.numel()

    @property
    def device(self) -> torch.device:
        """Device of every tensor."""
        return self.exp_avg.device

    @property
    def eight_bit(self) -> bool:
        """Whether state is 8-bit."""
        return self.exp_avg.dtype == torch.uint8

    @property
    def precision(self) -> str:
        """Where the full precision of the weights is: "master", "remainder" or "stochastic" (nowhere)."""
        if self.master is not None:
            return "master"
        return "stochastic" if self.remainder is None else "remainder"

    @property
    def variant(self) -> tuple[Any, ...]:
        """What buffers of one step must have in common."""
        return self.precision, self.eight_bit, None if self.weight is None else self.weight.dtype, self.device

    @property
    def bytes_per_update(self) -> float:
        """Bytes that an update reads and writes per active element, gradient aside; exact but for ends of blocks."""
        read_and_written = (self.exp_avg, self.exp_avg_sq, self.master, self.remainder)
        moved = 2.0 * sum(tensor.element_size() for tensor in read_and_written if tensor is not None)
        if self.weight is not None:
            moved += self.weight.element_size() * (1 if self.precision == "master" else 2)
        return moved + (2 * 2 * 4 / STATE_BLOCK if self.eight_bit else 0)

    def _require(self, name: str, *dtypes: torch.dtype, numel: int | None = None) -> None:
        tensor = getattr(self, name)
        if tensor is None:
            return
        numel = self.numel if numel is None else numel
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tensor.shape != (numel,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous with shape ({numel},), got {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device} like exp_avg, got {tensor.device}")

    def _require_whole_blocks(self) -> None:
        """A scale belongs to one segment: were two to share it, updating one would rescale the other."""
        for index, segment in enumerate(self.segments):
            if segment.start % STATE_BLOCK:
                raise ValueError(
                    f"segments[{index}].start must be a multiple of {STATE_BLOCK} with 8-bit state, got {segment.start}"
                )
