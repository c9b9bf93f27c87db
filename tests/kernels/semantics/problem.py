"""Flat buffers between guard zones, gradients for them, and AdamW in float64 as an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from progtuning_kernels import STATE_BLOCK, FlatBuffer, Hyper, Launch, MaskedStep, Segment
from progtuning_kernels.rounding import join, split

GUARD = 64
SMALL = Launch(tile=1024, block=1024, norm_programs=2)
"""Cuts small buffers into many tiles, and keeps the interpreter's grid small."""

GROUPS = (
    Hyper(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    Hyper(lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0),
    Hyper(lr=5e-2, betas=(0.0, 0.99), eps=1e-3, weight_decay=0.01),
)


class Arena:
    """Allocates tensors inside guard zones and at odd offsets, and knows whether a guard was touched."""

    def __init__(self, device: str, odd: int = 0) -> None:
        self.device = device
        self.odd = odd
        self.zones: list[tuple[torch.Tensor, int, int]] = []

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """Return a copy of 1-D ``values``, ``odd`` elements off a 16-byte boundary, poisoned on both sides."""
        start = GUARD + self.odd
        whole = torch.full((start + len(values) + GUARD,), 77, dtype=values.dtype, device=self.device)
        whole[start : start + len(values)] = values.to(self.device)
        self.zones.append((whole, start, start + len(values)))
        return whole[start : start + len(values)]

    def untouched(self) -> bool:
        return all(bool((whole[:a] == 77).all() and (whole[b:] == 77).all()) for whole, a, b in self.zones)


@dataclass
class Case:
    """Buffers of one variant, the step over them, and how their gradients are handed over."""

    arena: Arena
    buffers: list[FlatBuffer]
    step: MaskedStep
    form: str
    dtype: torch.dtype

    def gradients(self, flat: Sequence[torch.Tensor], active: Sequence[Sequence[bool]] | None = None) -> list:
        """Hand over fp32 gradients of whole buffers in this case's dtype and form; None for what is frozen."""
        cast = [self.arena.place(values.to(self.dtype)) for values in flat]
        if self.form == "flat":
            return cast
        active = active or [[s.active for s in b.segments] for b in self.buffers]
        return [
            [
                self.arena.place(g[s.start : s.stop]) if trains else None
                for s, trains in zip(b.segments, flags, strict=True)
            ]
            for b, g, flags in zip(self.buffers, cast, active, strict=True)
        ]

    def masters(self) -> list[torch.Tensor]:
        return [full_precision(buffer) for buffer in self.buffers]

    def contents(self) -> list[torch.Tensor]:
        """A copy of every tensor of every buffer."""
        names = ("exp_avg", "exp_avg_sq", "weight", "master", "remainder", "absmax", "absmax_sq")
        tensors = (getattr(buffer, name) for buffer in self.buffers for name in names)
        return [tensor.clone() for tensor in tensors if tensor is not None]


def full_precision(buffer: FlatBuffer) -> torch.Tensor:
    if buffer.master is not None:
        return buffer.master
    return buffer.weight.float() if buffer.remainder is None else join(buffer.weight, buffer.remainder)


def random_weights(numel: int, seed: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def make_buffer(
    arena: Arena,
    segments: Sequence[Segment],
    numel: int,
    *,
    precision: str = "master",
    weight: torch.dtype | None = torch.bfloat16,
    eight_bit: bool = False,
    seed: int = 0,
) -> FlatBuffer:
    """A buffer with random weights, and state as before the first step."""
    values = random_weights(numel, seed)
    if precision == "stochastic":
        values = values.bfloat16().float()
    rounded = torch.empty(numel, dtype=torch.bfloat16)
    remainder = torch.empty(numel, dtype=torch.int16)
    if precision == "remainder":
        split(values, rounded, remainder)
    else:
        rounded = None if weight is None else values.to(weight)
    state = torch.uint8 if eight_bit else torch.float32
    scales = torch.zeros(-(-numel // STATE_BLOCK))
    return FlatBuffer(
        segments=tuple(segments),
        exp_avg=arena.place(torch.zeros(numel, dtype=state)),
        exp_avg_sq=arena.place(torch.zeros(numel, dtype=state)),
        weight=None if rounded is None else arena.place(rounded),
        master=arena.place(values) if precision == "master" else None,
        remainder=arena.place(remainder) if precision == "remainder" else None,
        absmax=arena.place(scales) if eight_bit else None,
        absmax_sq=arena.place(scales) if eight_bit else None,
    )


LAYOUT = (
    # odd sizes, one-element segments, neighbours of one group and of others, a gap, padding at the end
    (
        Segment(0, 1, 0),
        Segment(1, 1, 1),
        Segment(2, 699, 0),
        Segment(701, 1300, 0),
        Segment(2001, 47, 2, active=False),
        Segment(2048, 1024, 1),
        Segment(3100, 1, 2),
    ),
    (Segment(5, 300, 2, active=False), Segment(305, 1536, 0), Segment(1841, 1, 1, active=False)),
)
SIZES = (3111, 1850)

BLOCK_LAYOUT = (
    # every segment begins with a block of 8-bit state
    (Segment(0, 1, 0), Segment(256, 1700, 1), Segment(2048, 256, 2, active=False), Segment(2304, 700, 0)),
    (Segment(0, 1536, 2), Segment(1536, 3, 1)),
)
BLOCK_SIZES = (3072, 1539)


def make_case(
    impl: str,
    device: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    form: str = "flat",
    max_norm: float = 1.0,
    odd: int = 0,
    launch: Launch = SMALL,
    groups: Sequence[Hyper] = GROUPS,
    layout: Sequence[Sequence[Segment]] | None = None,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    **buffer: object,
) -> Case:
    """The same weights for the same layout, whatever the rest."""
    arena = Arena(device, odd)
    eight_bit = bool(buffer.get("eight_bit"))
    layout = layout or (BLOCK_LAYOUT if eight_bit else LAYOUT)
    sizes = sizes or (BLOCK_SIZES if eight_bit else SIZES)
    buffers = [
        make_buffer(arena, segments, numel, seed=index, **buffer)
        for index, (segments, numel) in enumerate(zip(layout, sizes, strict=True))
    ]
    step = MaskedStep(buffers, groups, max_norm=max_norm, gradients=form, impl=impl, seed=seed, launch=launch)
    return Case(arena, buffers, step, form, dtype)


def random_gradients(sizes: Sequence[int], step: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(numel, generator=generator) * scale for numel in sizes]


def poison_frozen(
    gradients: Sequence[torch.Tensor], layout: Sequence[Sequence[Segment]], active: Sequence[Sequence[bool]]
) -> list[torch.Tensor]:
    """Gradients that are NaN wherever nothing trains: in frozen segments, gaps and padding."""
    poisoned = [torch.full_like(g, float("nan")) for g in gradients]
    for new, old, segments, flags in zip(poisoned, gradients, layout, active, strict=True):
        for segment, trains in zip(segments, flags, strict=True):
            if trains:
                new[segment.start : segment.stop] = old[segment.start : segment.stop]
    return poisoned


class Oracle:
    """`torch.optim.AdamW` in float64, one parameter per segment; what is frozen has no gradient."""

    def __init__(self, case: Case, groups: Sequence[Hyper] = GROUPS, max_norm: float = 1.0) -> None:
        self.max_norm = max_norm
        self.layout = [buffer.segments for buffer in case.buffers]
        self.params = [
            [master[s.start : s.stop].double().cpu().clone() for s in segments]
            for master, segments in zip(case.masters(), self.layout, strict=True)
        ]
        named = [
            {"params": [], "lr": g.lr, "betas": g.betas, "eps": g.eps, "weight_decay": g.weight_decay} for g in groups
        ]
        for params, segments in zip(self.params, self.layout, strict=True):
            for param, segment in zip(params, segments, strict=True):
                named[segment.group]["params"].append(param)
        self.optimizer = torch.optim.AdamW([g for g in named if g["params"]], foreach=False)
        self.norm = 0.0

    def run(self, gradients: Sequence[torch.Tensor], active: Sequence[Sequence[bool]]) -> None:
        """One step; gradients are unscaled."""
        for params, segments, flat, flags in zip(self.params, self.layout, gradients, active, strict=True):
            for param, s, trains in zip(params, segments, flags, strict=True):
                param.grad = flat[s.start : s.stop].double() if trains else None
        present = [param.grad for params in self.params for param in params if param.grad is not None]
        self.norm = torch.cat(present).norm().item()
        if self.max_norm:
            for gradient in present:
                gradient.div_(max(1.0, (self.norm + 1e-6) / self.max_norm))
        self.optimizer.step()


def active_flags(layout: Sequence[Sequence[Segment]] = LAYOUT) -> list[list[bool]]:
    return [[segment.active for segment in segments] for segments in layout]


def single_segment(numel: int, launch: Launch = SMALL) -> dict[str, object]:
    """Arguments of `make_case` for one buffer that is one segment of group 0."""
    return {"layout": [(Segment(0, numel, 0),)], "sizes": [numel], "launch": replace(launch)}
