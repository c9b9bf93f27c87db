"""Everything a step decides: hyperparameters, step counts, loss scale, norm, clip coefficient and skip flag.

All of it lives on the device, so that a step never waits for the host. Imports torch alone, and no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyperparameters of one group, as `torch.optim.AdamW` names them."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise ValueError(f"lr must be at least 0, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


HYPER_COLUMNS = 5
"""lr, beta1, beta2, eps, weight decay."""
SCALAR_COLUMNS = 8
"""decay, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(bias correction 2), eps, step size, unused: what an element needs."""


class Control:
    """Device tensors of one step; ``finalize`` fills the lower half from the upper one.

    Attributes:
        hyper: fp64 [groups, 5], rows of `Hyper`.
        steps: int64 [groups], updates that each group has received.
        active: int32 [groups], 1 where some segment trains (on any rank).
        limits: fp64 [2]: loss scale (gradients are this many times too large) and the norm to clip at (0: none).
        sum_of_squares: fp64 [1], of the scaled gradients; summed over ranks between ``masked_norm`` and ``finalize``.
        norm: fp64 [1], global norm of the unscaled gradients; NaN or inf in a skipped step.
        skip: int32 [1], 1 if a gradient was NaN or inf.
        skipped: int64 [1], how many steps were.
        grad_scale: fp32 [1], what gradients are multiplied with: unscaling and clipping in one.
        scalars: fp32 [groups, 8].
        updates: int64 [1], steps that were not skipped.
        noise_key: int64 [1], a 32-bit number, another one in every step; for stochastic rounding.
    """

    def __init__(
        self, groups: Sequence[Hyper], device: torch.device | str, *, max_norm: float = 0.0, seed: int = 0
    ) -> None:
        if not groups:
            raise ValueError("groups must name at least one group, got none")
        self.device = torch.device(device)
        self.seed = seed & 0xFFFFFFFF

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.hyper = zeros(len(groups), HYPER_COLUMNS, dtype=torch.float64)
        self.steps = zeros(len(groups), dtype=torch.int64)
        self.active = zeros(len(groups), dtype=torch.int32)
        self.limits = zeros(2, dtype=torch.float64)
        self.sum_of_squares = zeros(1, dtype=torch.float64)
        self.norm = zeros(1, dtype=torch.float64)
        self.skip = zeros(1, dtype=torch.int32)
        self.skipped = zeros(1, dtype=torch.int64)
        self.grad_scale = zeros(1, dtype=torch.float32)
        self.scalars = zeros(len(groups), SCALAR_COLUMNS, dtype=torch.float32)
        self.updates = zeros(1, dtype=torch.int64)
        self.noise_key = zeros(1, dtype=torch.int64)
        self._groups: tuple[Hyper, ...] = ()
        self._limits: tuple[float, float] = (0.0, 0.0)
        self.set_groups(groups)
        self.set_limits(loss_scale=1.0, max_norm=max_norm)

    @property
    def groups(self) -> tuple[Hyper, ...]:
        """Hyperparameters as last set."""
        return self._groups

    def set_groups(self, groups: Sequence[Hyper]) -> None:
        """Set the hyperparameters of every group; copies to the device only what is new, and does not wait.

        Raises:
            ValueError: another number of groups than there are.
        """
        if len(groups) != len(self.steps):
            raise ValueError(f"groups must have {len(self.steps)} entries, got {len(groups)}")
        if tuple(groups) != self._groups:
            self._groups = tuple(groups)
            rows = [[group.lr, *group.betas, group.eps, group.weight_decay] for group in groups]
            copy_without_waiting(self.hyper, torch.tensor(rows, dtype=torch.float64))

    def set_limits(self, *, loss_scale: float | None = None, max_norm: float | None = None) -> None:
        """Set the loss scale or the norm to clip at (0: no clipping); copies only what is new, and does not wait.

        Raises:
            ValueError: a loss scale that is not positive, or a negative norm.
        """
        new = (
            self._limits[0] if loss_scale is None else float(loss_scale),
            self._limits[1] if max_norm is None else float(max_norm),
        )
        if not new[0] > 0:
            raise ValueError(f"loss_scale must be positive, got {new[0]}")
        if not new[1] >= 0:
            raise ValueError(f"max_norm must be at least 0 (0: no clipping), got {new[1]}")
        if new != self._limits:
            self._limits = new
            copy_without_waiting(self.limits, torch.tensor(new, dtype=torch.float64))

    def set_steps(self, steps: Sequence[int]) -> None:
        """Say how many updates each group has received, as after a resume.

        Raises:
            ValueError: another number of groups than there are, or a negative count.
        """
        if len(steps) != len(self.steps) or min(steps) < 0:
            raise ValueError(f"steps must be {len(self.steps)} counts of at least 0, got {list(steps)}")
        copy_without_waiting(self.steps, torch.tensor(list(steps), dtype=torch.int64))

    def set_active(self, active: Sequence[bool]) -> None:
        """Say which groups train: one flag per group, the same on every rank."""
        if len(active) != len(self.steps):
            raise ValueError(f"active must have {len(self.steps)} entries, got {len(active)}")
        copy_without_waiting(self.active, torch.tensor([int(flag) for flag in active], dtype=torch.int32))


def copy_without_waiting(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a small CPU tensor in stream order without waiting for the device.

    ``source`` is pageable on purpose: CUDA stages it before the call returns, so it may be freed at once, whereas
    a pinned one would have to outlive the copy.
    """
    target.copy_(source, non_blocking=True)
