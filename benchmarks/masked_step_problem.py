"""What the benchmark of the masked step measures it on: parameters of known models, in flat groups on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from progtuning_kernels import STATE_BLOCK, FlatBuffer, Hyper, Launch, MaskedStep, Segment
from progtuning_kernels.rounding import split

GROUPS = (Hyper(lr=1e-4, weight_decay=0.01), Hyper(lr=1e-4, weight_decay=0.0))
MAX_NORM = 1.0


def model_shapes(size: str) -> list[torch.Size]:
    """Shapes of a model's parameters in model order: BERT of 42M and 335M, a Llama-shaped one of 1.3B."""
    from transformers import AutoModel, BertConfig, LlamaConfig

    configs = {
        "42M": BertConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048),
        "335M": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        "1.3B": LlamaConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5504),
    }
    with torch.device("meta"):
        return [p.shape for p in AutoModel.from_config(configs[size]).parameters()]


SIZES = ("42M", "335M", "1.3B")


@dataclass
class Problem:
    """Parameters in two flat groups (with and without weight decay), as ZeRO-1/2 holds them on one rank."""

    shapes: list[list[torch.Size]]
    """Per group, in model order."""

    @classmethod
    def of(cls, size: str) -> Problem:
        shapes = model_shapes(size)
        return cls([[s for s in shapes if len(s) >= 2], [s for s in shapes if len(s) < 2]])

    @property
    def numel(self) -> int:
        return sum(shape.numel() for group in self.shapes for shape in group)

    def gradients(self) -> list[list[torch.Tensor]]:
        """Fresh random bf16 gradients, one tensor per parameter."""
        return [[torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in group] for group in self.shapes]

    def buffers(self, precision: str = "master", eight_bit: bool = False) -> list[FlatBuffer]:
        return [flat_buffer(self.segments(index, eight_bit), precision, eight_bit) for index in (0, 1)]

    def segments(self, group: int, eight_bit: bool = False) -> tuple[Segment, ...]:
        segments, end = [], 0
        for shape in self.shapes[group]:
            segments.append(Segment(end, shape.numel(), group))
            end += -(-shape.numel() // STATE_BLOCK) * STATE_BLOCK if eight_bit else shape.numel()
        return tuple(segments)

    def mask(self, frozen: float) -> list[list[bool]]:
        """Flags that freeze the lowest tensors, up to a share of all elements."""
        flags = []
        for group in self.shapes:
            limit, seen, row = frozen * sum(s.numel() for s in group), 0, []
            for shape in group:
                seen += shape.numel()
                row.append(seen > limit)
            flags.append(row)
        return flags

    def active_share(self, mask: Sequence[Sequence[bool]]) -> float:
        pairs = ((s.numel(), f) for g, row in zip(self.shapes, mask, strict=True) for s, f in zip(g, row, strict=True))
        return sum(n for n, flag in pairs if flag) / self.numel


def flat_buffer(segments: tuple[Segment, ...], precision: str, eight_bit: bool) -> FlatBuffer:
    """Random weights, and state as after some steps; 16-bit outputs that the step must overwrite are poisoned."""
    numel = segments[-1].stop
    master = torch.randn(numel, device="cuda")
    weight = torch.full((numel,), float("nan"), dtype=torch.bfloat16, device="cuda")
    remainder = None
    if precision == "remainder":
        remainder = torch.empty(numel, dtype=torch.int16, device="cuda")
        split(master, weight, remainder)
    elif precision == "stochastic":
        weight.copy_(master)
    if eight_bit:
        blocks = -(-numel // STATE_BLOCK)
        state = {name: torch.randint(0, 256, (numel,), dtype=torch.uint8, device="cuda") for name in ("m", "v")}
        scales = {name: torch.rand(blocks, device="cuda") * 1e-2 for name in ("absmax", "absmax_sq")}
    else:
        state = {"m": torch.randn(numel, device="cuda") * 1e-2, "v": torch.rand(numel, device="cuda") * 1e-4}
        scales = {}
    kept = master if precision == "master" else None
    return FlatBuffer(segments, state["m"], state["v"], weight=weight, master=kept, remainder=remainder, **scales)


def fused(
    problem: Problem, precision: str = "master", eight_bit: bool = False, launch: Launch | None = None
) -> MaskedStep:
    buffers = problem.buffers(precision, eight_bit)
    return MaskedStep(buffers, GROUPS, max_norm=MAX_NORM, gradients="segments", impl="triton", launch=launch)
