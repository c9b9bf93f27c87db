"""When two training runs count as the same; tight enough that a lost moment or a rounded master is told apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.engine import reference
from tests.engine.problem import Phase
from tests.engine.reference import Numerics, Run


@dataclass(frozen=True)
class Tolerance:
    """Largest differences allowed, absolute but for losses above 1; ``mean`` and ``largest`` are over all elements."""

    loss: float
    norm: float
    mean: float
    largest: float


EXACT = Tolerance(loss=0.0, norm=0.0, mean=0.0, largest=0.0)
# Sums over ranks, groups and micro-batches in another order: a unit in the last place here and there. Measured on
# two ranks: losses 1.2e-7, norms 2e-7, weights 2.4e-7. Where a gradient is next to nothing, Adam's quotient makes a
# step of its rounding: single elements were off by 1.3e-6 on three ranks and another processor, with DeepSpeedCPUAdam.
# What tells a wrong transition is the mean.
SINGLE = Tolerance(loss=2.5e-7, norm=5e-7, mean=5e-8, largest=4e-6)
# Masters agree to 1e-7 until one of them lies so near the middle between two bit16 numbers that its weight is rounded
# to the other one; from then on gradients differ by their rounding everywhere. Measured: losses equal in all flavours
# with torch's linear layer and one unit of bf16 (2**-7) elsewhere, masters 1.7e-5 in the mean and 4.3e-4 at most,
# weights one unit of bf16, which is 2**-8 below 1. For comparison, taking bit16 weights for masters once is 3e-5 in
# the mean, losing the moments of one matrix 1.4e-4, of all 7e-4.
MIXED = Tolerance(loss=2**-7, norm=2e-3, mean=2.5e-5, largest=2**-7)


def tolerance_for(numerics: Numerics) -> Tolerance:
    """The tolerance that fits a flavour's numerics."""
    return SINGLE if numerics.weights == torch.float32 else MIXED


@functools.cache
def oracle(kind: str, phases: tuple[Phase, ...], world_size: int, numerics: Numerics, device: str) -> Run:
    """The reference's run, once for all flavours that share it."""
    return reference.train(kind, phases, world_size, numerics, device)


def assert_agree(runs: Sequence[Run], expected: Run, tolerance: Tolerance) -> None:
    """Compare what the ranks did, ``runs``, with ``expected``; the ranks' states have to be complete."""
    losses = [[loss for run in runs for loss in run.losses[step]] for step in range(len(expected.losses))]
    theirs = torch.tensor(expected.losses)
    difference = ((torch.tensor(losses) - theirs).abs() / theirs.clamp(min=1.0)).max().item()
    assert difference <= tolerance.loss, f"losses differ by {difference:.1e}"
    for run in runs:
        norms = [abs(a - b) for a, b in zip(run.norms, expected.norms, strict=True) if not math.isnan(a)]
        assert max(norms, default=0.0) <= tolerance.norm, f"gradient norms differ by {max(norms):.1e}"
        for phase, (ours, theirs) in enumerate(zip(run.weights, expected.weights, strict=True)):
            assert_near(ours, theirs, tolerance, f"weights after phase {phase}")
    for kind in ("masters", "exp_avg", "exp_avg_sq"):
        for run in runs:
            if getattr(run, kind):  # stage 0 links no state to parameters
                assert_near(getattr(run, kind), getattr(expected, kind), tolerance, kind)


def assert_near(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: Tolerance, what: str
) -> None:
    """The same names, the same shapes, and elements within ``tolerance``."""
    assert ours.keys() == theirs.keys(), f"{what}: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    differences = {}
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, f"{what} of {name}: {ours[name].shape}, not {tensor.shape}"
        differences[name] = (ours[name].double() - tensor.double()).abs()
    worst = max(differences, key=lambda name: differences[name].max().item())
    mean = torch.cat([d.flatten() for d in differences.values()]).mean().item()
    assert differences[worst].max() <= tolerance.largest, f"{what}: {worst} by {differences[worst].max():.1e}"
    assert mean <= tolerance.mean, f"{what}: {mean:.1e} in the mean"
