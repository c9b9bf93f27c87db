"""AdamW as one fused pass over what trains, as an ordinary PyTorch optimizer.

Owns state per parameter and which parameters are frozen; what a step computes is `progtuning_kernels`'s. Knows
nothing of DeepSpeed, which may be given it like any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from progtuning_kernels import STATE_BLOCK, FlatBuffer, Hyper, MaskedStep, Segment
from torch.utils.weak import WeakIdKeyDictionary

from progtuning_ds.errors import did_you_mean

MASTERS = ("fp32", "remainder", "stochastic")
"""What a 16-bit parameter keeps beside itself: an fp32 master, its low 16 bits (bf16 only; the same bits as with a
master, 2 bytes less), or nothing (bf16 only; rounded stochastically)."""


@dataclass(frozen=True, eq=False)
class _Launch:
    """One `MaskedStep` and what it updates this time."""

    params: list[torch.nn.Parameter]
    active: list[bool]
    step: MaskedStep


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay (arXiv 1711.05101) in one pass: norm, clip, update, 16-bit weight.

    >>> optimizer = MaskedAdamW(model.parameters(), lr=2e-5, max_norm=1.0)
    >>> optimizer.step()                                  # reads .grad, which it never writes
    >>> optimizer.freeze(model.embeddings.parameters())   # from the next step on, state kept

    A step with NaN or infinity in a gradient changes nothing and is counted in ``skipped_steps``. A parameter without
    a gradient is left alone, as torch's optimizers do. State has torch's names: ``step`` (fp32, on the CPU),
    ``exp_avg``, ``exp_avg_sq``; also ``master`` or ``remainder``, and ``absmax``, ``absmax_sq`` with 8-bit state.

    Args:
        params: parameters or parameter groups; contiguous, of fp32, bf16 or fp16.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        max_norm: clip the gradients of all groups together at this norm; 0 for none.
        kernel: "auto", "triton" or "reference"; see ``progtuning_kernels.dispatch.choose``.
        master: one of ``MASTERS``; parameters in fp32 are their own masters.
        state_bits: 32, or 8 for block-wise quantized moments as bitsandbytes keeps them.
        seed: of stochastic rounding.

    Raises:
        ValueError: for a value that is not allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float = 0.0,
        kernel: str = "auto",
        master: str = "fp32",
        state_bits: int = 32,
        seed: int = 0,
    ) -> None:
        if master not in MASTERS:
            raise ValueError(
                f"master must be one of {', '.join(MASTERS)}, got {master!r}{did_you_mean(master, MASTERS)}"
            )
        if state_bits not in (32, 8):
            raise ValueError(f"state_bits must be 32 or 8, got {state_bits!r}")
        if not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0 (0: no clipping), got {max_norm}")
        Hyper(lr, betas, eps, weight_decay)  # refuses what makes no sense
        self.max_norm = max_norm
        self.kernel = kernel
        self.master = master
        self.state_bits = state_bits
        self.seed = seed
        self.skipped_steps = 0
        self._frozen: set[int] = set()
        # Keyed by the first parameter, weakly: DeepSpeed drops masters, and nothing here may keep them alive.
        self._steps = WeakIdKeyDictionary()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def freeze(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Leave ``params`` as they are from the next step on, whatever their gradients; their state stays."""
        self._frozen |= {id(p) for p in params}

    def unfreeze(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Train ``params`` again, with the state they had."""
        self._frozen -= {id(p) for p in params}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient and is not frozen."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches = [self._launch(params) for params in self._alike()]
        if launches:
            self._share_norm([launch.step for launch in launches])
            for launch in launches:
                launch.step.update()
                launch.step.work.release()
            self._count(launches)
        return loss

    def _launch(self, params: list[torch.nn.Parameter]) -> _Launch:
        """Bind gradients and measure their norm; nothing is updated yet."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        active = [p.grad is not None and id(p) not in self._frozen for p in params]
        step = self._step_for(params)
        step.set_active([[flag] for flag in active])
        step.control.set_groups([hyper_of(groups[id(p)]) for p in params])
        step.control.set_limits(max_norm=self.max_norm)
        step.bind([[p.grad if flag else None] for p, flag in zip(params, active, strict=True)])
        step.measure()
        return _Launch(params, active, step)

    @staticmethod
    def _share_norm(steps: list[MaskedStep]) -> None:
        """Parameters of several dtypes or devices are clipped, and skipped, together."""
        total = torch.stack([step.control.sum_of_squares.to(steps[0].control.device) for step in steps]).sum(dim=0)
        for step in steps:
            step.control.sum_of_squares.copy_(total)

    def _count(self, launches: list[_Launch]) -> None:
        if launches[0].step.control.skip.item():
            self.skipped_steps += 1
            return
        for launch in launches:
            for param, active in zip(launch.params, launch.active, strict=True):
                if active:
                    self.state[param]["step"] += 1

    # ---- state -------------------------------------------------------------------------------------------------

    def _alike(self) -> list[list[torch.nn.Parameter]]:
        """The parameters by what one launch can update together."""
        alike: dict[Any, list[torch.nn.Parameter]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.numel():
                    alike.setdefault((param.dtype, param.device), []).append(param)
        return list(alike.values())

    def _step_for(self, params: list[torch.nn.Parameter]) -> MaskedStep:
        buffers = [self._buffer(index, param) for index, param in enumerate(params)]
        key = [(id(p), *_pointers(buffer)) for p, buffer in zip(params, buffers, strict=True)]
        known, step = self._steps.get(params[0], (None, None))
        if known != key:
            step = MaskedStep(buffers, [Hyper()] * len(params), gradients="segments", impl=self.kernel, seed=self.seed)
            # Noise follows the count of updates, so that a resumed run rounds as the uninterrupted one.
            step.control.updates.fill_(max(int(self.state[p]["step"]) for p in params))
            self._steps[params[0]] = (key, step)
        step.control.set_steps([int(self.state[p]["step"]) for p in params])
        return step

    def _buffer(self, index: int, param: torch.nn.Parameter) -> FlatBuffer:
        state = self._state(param)
        flat = param.detach().view(-1)
        wide = flat.dtype == torch.float32
        return FlatBuffer(
            segments=(Segment(0, flat.numel(), index),),
            exp_avg=state["exp_avg"].view(-1),
            exp_avg_sq=state["exp_avg_sq"].view(-1),
            weight=None if wide else flat,
            master=flat if wide else _flat(state.get("master")),
            remainder=_flat(state.get("remainder")),
            absmax=state.get("absmax"),
            absmax_sq=state.get("absmax_sq"),
        )

    def _state(self, param: torch.nn.Parameter) -> dict[str, Any]:
        state = self.state[param]
        if "exp_avg" in state:
            return state
        if not param.is_contiguous():
            raise ValueError(f"params must be contiguous, got one of shape {tuple(param.shape)} that is not")
        state["step"] = torch.zeros((), dtype=torch.float32)
        if self.state_bits == 32:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        else:
            scales = -(-param.numel() // STATE_BLOCK)
            for name, absmax in (("exp_avg", "absmax"), ("exp_avg_sq", "absmax_sq")):
                state[name] = torch.zeros_like(param, dtype=torch.uint8)
                state[absmax] = torch.zeros(scales, dtype=torch.float32, device=param.device)
        if param.dtype != torch.float32:
            if self.master == "fp32":
                state["master"] = param.detach().float()
            elif self.master == "remainder":
                state["remainder"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype: torch would round fp32 moments of a 16-bit parameter to its dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        live = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, live, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if torch.is_tensor(value):
                    device = torch.device("cpu") if name == "step" else param.device
                    self.state[param][name] = value.detach().to(device, copy=True)
        self._steps.clear()


def register_optimizer() -> None:
    """Let a DeepSpeed JSON name it: ``{"optimizer": {"type": "MaskedAdamW", "params": {...}}}``.

    DeepSpeed looks up types it does not know in ``torch.optim`` (``runtime/engine.py``,
    ``_configure_basic_optimizer``); this puts the class there. With ZeRO, ``zero_allow_untested_optimizer`` must be
    true. Calling it twice does no harm.
    """
    torch.optim.MaskedAdamW = MaskedAdamW  # type: ignore[attr-defined]


def hyper_of(group: dict[str, Any]) -> Hyper:
    """Hyperparameters of a parameter group, as they are now."""
    return Hyper(float(group["lr"]), tuple(group["betas"]), float(group["eps"]), float(group["weight_decay"]))


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.view(-1)


def _pointers(buffer: FlatBuffer) -> tuple[int, ...]:
    tensors = (buffer.exp_avg, buffer.exp_avg_sq, buffer.weight, buffer.master, buffer.remainder)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
