"""The whole step on flat buffers: norm, all-reduce of one number, decision, update. Imports torch alone, no kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from progtuning_kernels.buffers import FlatBuffer
from progtuning_kernels.control import Control, Hyper
from progtuning_kernels.dispatch import choose
from progtuning_kernels.worklist import Gradients, Launch, WorkList

Reduce = Callable[[torch.Tensor], None]
"""Sums an fp64 [1] tensor in place over all ranks that hold a share of the gradients."""


class MaskedStep:
    """One optimizer step on buffers that live elsewhere: unscale, clip, AdamW and 16-bit copy of what is active.

    Gradients are read, never written. With Triton no call waits for the device, and `run` can be captured in a CUDA
    graph if `Launch.persistent_programs` is set; the graph then outlives changes of mask, hyperparameters and limits
    (not of gradient addresses: those must be the ones that were bound when it was captured, or be bound anew before
    a replay).

    Attributes:
        control: what the step decides, on the device; ``control.skip`` and ``control.norm`` tell how it went.
        work: what it updates.
        implementation: "triton", "reference" or "fused_cpu".
    """

    def __init__(
        self,
        buffers: Sequence[FlatBuffer],
        groups: Sequence[Hyper],
        *,
        max_norm: float = 0.0,
        gradients: str = "flat",
        impl: str = "auto",
        seed: int = 0,
        launch: Launch | None = None,
    ) -> None:
        """Prepare a step; nothing is updated yet.

        Args:
            buffers: of one variant and device, e.g. one per ZeRO-1/2 group or one per ZeRO-3 sub-group.
            groups: hyperparameters that the segments' ``group`` indexes.
            max_norm: global norm to clip at; 0 for none.
            gradients: "flat" (one tensor per buffer) or "segments" (one tensor per segment).
            impl: see `dispatch.choose`.
            seed: of stochastic rounding.
            launch: how the kernels cut their work.

        Raises:
            ValueError: see `FlatBuffer`, `WorkList`, `Control` and `dispatch.choose`.
        """
        self.work = WorkList(buffers, len(groups), gradients=gradients, launch=launch)
        self.control = Control(groups, self.work.device, max_norm=max_norm, seed=seed)
        self.control.set_active(self.work.active_groups)
        self._ops = choose(impl, self.work.buffers[0])
        self.implementation = self._ops.name

    def set_active(self, active: Sequence[Sequence[bool]], groups: Sequence[bool] | None = None) -> None:
        """Freeze and unfreeze, from the next step on.

        Args:
            active: one flag per segment, per buffer.
            groups: which groups count steps. Ranks must agree on it; None is for a single rank, or ranks that all
                hold a part of every active group: the groups that have an active segment here.
        """
        self.work.set_active(active)
        self.control.set_active(self.work.active_groups if groups is None else groups)

    def bind(self, gradients: Sequence[Gradients]) -> None:
        """Say where the gradients are; see `WorkList.bind`."""
        self.work.bind(gradients)

    def run(self, reduce: Reduce | None = None) -> None:
        """Run the step on the bound gradients.

        Args:
            reduce: all-reduce of the sum of squares; None on a single rank. Every rank must call it, also one that
                has nothing active.
        """
        self.measure()
        if reduce is not None:
            reduce(self.control.sum_of_squares)
        self.update()

    def measure(self) -> None:
        """First half of `run`: write the sum of squares of the active gradients to ``control.sum_of_squares``."""
        self._ops.masked_norm_(self.work, self.control.sum_of_squares)

    def update(self) -> None:
        """Second half of `run`: decide from ``control.sum_of_squares``, and update unless it is not finite.

        Several steps that are clipped together share the sum of theirs.
        """
        self._ops.finalize_(self.control)
        self._ops.masked_adamw_(self.work, self.control)

    def step(
        self, gradients: Sequence[Gradients], *, reduce: Reduce | None = None, loss_scale: float | None = None
    ) -> None:
        """Run a step and forget the gradients, which may be freed afterwards.

        Args:
            gradients: per buffer; see `WorkList.bind`.
            reduce: see `run`.
            loss_scale: how many times too large the gradients are; None: as last time (1 at first).
        """
        if loss_scale is not None:
            self.control.set_limits(loss_scale=loss_scale)
        self.bind(gradients)
        self.run(reduce)
        self.work.release()
