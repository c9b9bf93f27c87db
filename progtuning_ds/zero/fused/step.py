"""What the fused step of every flavour does: state, settings, mask, and the decision about a step.

Owns the `MaskedStep` of an engine. A flavour adds where gradients lie before a step and what is to be done after one.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from deepspeed import comm as dist
from progtuning_kernels import FlatBuffer, Hyper, MaskedStep, Segment

from progtuning_ds.optim import hyper_of
from progtuning_ds.zero.adapter import Adapter, Parameter
from progtuning_ds.zero.fused.adamw import state_of


@dataclass(frozen=True, eq=False)
class MasterGroup:
    """One master and what it belongs to.

    Attributes:
        params: all parameters updated with it, on whatever rank.
        pieces: ``(owner, start, length)`` of each stretch of it that belongs to one parameter, in order; without
            padding.
        master: 1-D; fp32.
        weight: 1-D, bf16 or fp16, what the model computes with; None if the master is copied or is the weight.
        group: index of its parameter group.
    """

    params: Sequence[Parameter]
    pieces: Sequence[tuple[Parameter, int, int]]
    master: torch.Tensor
    weight: torch.Tensor | None
    group: int


class FusedStep(abc.ABC):
    """Stands in for ``step`` of one DeepSpeed optimizer.

    A step with NaN or infinity in a gradient is skipped on all ranks, in every precision. What is masked takes no
    part in the norm either.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = (
        "step",
        "zero_grad",
        "loss_scale",
        "clip_grad",
        "overflow",
        "_update_scale",
        "_global_grad_norm",
    )
    """Attributes of DeepSpeed's optimizer that the step relies on, beside those of the adapter."""

    def __init__(self, adapter: Adapter, kernel: str) -> None:
        self.adapter = adapter
        self.wrapper = adapter.wrapper
        self._kernel = kernel
        self._masked: set[int] = set()
        self._step: MaskedStep | None = None
        self._groups: list[MasterGroup] = []
        self._pointers: tuple[Any, ...] = ()
        self._counts: list[float] = []
        self._prepare()
        self.wrapper.step = self.step

    # ---- what a flavour provides -------------------------------------------------------------------------------

    @abc.abstractmethod
    def master_groups(self) -> list[MasterGroup]:
        """The masters as DeepSpeed holds them now."""

    @abc.abstractmethod
    def gradients(self) -> list[list[torch.Tensor]]:
        """Per master, one 1-D gradient per piece; reduced, still scaled."""

    @abc.abstractmethod
    def before(self) -> None:
        """What DeepSpeed does first in a step."""

    @abc.abstractmethod
    def forget_gradients(self) -> None:
        """Release the gradients, used or not."""

    @abc.abstractmethod
    def after(self) -> None:
        """Bring the updated weights to all ranks, and what else DeepSpeed does last in a step."""

    # ---- the step ----------------------------------------------------------------------------------------------

    @property
    def implementation(self) -> str:
        """Name of what computes: "triton", "reference" or "fused_cpu"."""
        return self._prepare().implementation

    @property
    def masked_step(self) -> MaskedStep:
        """The kernels' side of it, for measurements: ``work.bytes_moved``, ``control``."""
        return self._prepare()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update what trains; called by the engine in place of DeepSpeed's own."""
        zero = self.wrapper
        self.before()
        step = self._prepare()
        step.control.set_groups(self._hypers())
        step.control.set_limits(loss_scale=float(zero.loss_scale), max_norm=float(zero.clip_grad))
        step.step(self.gradients(), reduce=self._reduce)
        # The one wait for the device: DeepSpeed's loss scaler and step counters live on the host.
        zero.overflow = bool(step.control.skip.item())
        zero._update_scale(zero.overflow)
        self.forget_gradients()
        if zero.overflow:
            zero._global_grad_norm = float("inf")
            return
        zero._global_grad_norm = step.control.norm.float().squeeze()
        self._count()
        self.after()

    def _reduce(self, sum_of_squares: torch.Tensor) -> None:
        dist.all_reduce(sum_of_squares, op=dist.ReduceOp.SUM, group=self.adapter.ranks.group)

    def _count(self) -> None:
        counted: set[int] = set()
        groups = self.adapter.torch_optimizer.param_groups
        for index, (entry, active) in enumerate(zip(self._groups, self._active_groups(), strict=True)):
            if not active:
                continue
            self.adapter.torch_optimizer.state[entry.master]["step"] += 1
            self._counts[index] += 1
            if "step" in groups[entry.group] and entry.group not in counted:
                groups[entry.group]["step"] += 1  # FusedAdam's own count
                counted.add(entry.group)

    # ---- the mask ----------------------------------------------------------------------------------------------

    @property
    def masked(self) -> frozenset[int]:
        """``id`` of the parameters that are held but do not train."""
        return frozenset(self._masked)

    def release(self) -> None:
        """Forget the masters and end the mask, before a transition: nothing here may keep a released one alive."""
        self._step = None
        self._groups = []
        self._pointers = ()
        self._masked = set()

    def mask(self, params: Iterable[Parameter]) -> None:
        """Hold exactly ``params`` from the next step on: their weights and state stay as they are, to the bit."""
        masked = {id(p) for p in params}
        if masked != self._masked:
            self._masked = masked
            if self._step is not None:
                self._apply_mask(self._step)

    def _apply_mask(self, step: MaskedStep) -> None:
        active = [[id(owner) not in self._masked for owner, _, _ in entry.pieces] for entry in self._groups]
        step.set_active(active, self._active_groups())

    def _active_groups(self) -> list[bool]:
        """Per master, whether anything of it trains on any rank."""
        return [any(id(p) not in self._masked for p in entry.params) for entry in self._groups]

    # ---- following the engine ----------------------------------------------------------------------------------

    def _prepare(self) -> MaskedStep:
        """The step for the masters and state that are there now; built anew after a transition or a load."""
        groups = self.master_groups()
        states = self._states(groups)
        pointers = tuple(
            (
                len(entry.pieces),
                0 if entry.weight is None else entry.weight.data_ptr(),
                *(tensor.data_ptr() for tensor in (entry.master, state["exp_avg"], state["exp_avg_sq"])),
            )
            for entry, state in zip(groups, states, strict=True)
        )
        if self._step is None or pointers != self._pointers or _counts(states) != self._counts:
            self._groups, self._pointers, self._counts = groups, pointers, _counts(states)
            self._step = self._build(groups, states)
        return self._step

    def _build(self, groups: list[MasterGroup], states: list[dict[str, Any]]) -> MaskedStep:
        buffers = [
            FlatBuffer(
                segments=tuple(Segment(start, length, index) for _, start, length in entry.pieces),
                exp_avg=state["exp_avg"],
                exp_avg_sq=state["exp_avg_sq"],
                weight=entry.weight,
                master=entry.master.detach(),
            )
            for index, (entry, state) in enumerate(zip(groups, states, strict=True))
        ]
        # Each master counts its own steps: those that joined later are younger.
        step = MaskedStep(buffers, self._hypers(), gradients="segments", impl=self._kernel)
        step.control.set_steps([int(count) for count in self._counts])
        self._masked &= {id(p) for entry in groups for p in entry.params}
        self._apply_mask(step)
        return step

    def _states(self, groups: list[MasterGroup]) -> list[dict[str, Any]]:
        optimizer = self.adapter.torch_optimizer
        return [state_of(optimizer, entry.master, optimizer.param_groups[entry.group]) for entry in groups]

    def _hypers(self) -> list[Hyper]:
        groups = self.adapter.torch_optimizer.param_groups
        return [hyper_of(groups[entry.group]) for entry in self._groups]


def _counts(states: list[dict[str, Any]]) -> list[float]:
    return [float(state["step"]) for state in states]
