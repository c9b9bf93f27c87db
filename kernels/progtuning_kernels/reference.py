"""What the kernels compute, in plain PyTorch on any device: this file defines the semantics. No Triton.

Every operation rounds once, in fp32, in the order written here; nothing is fused. The Triton kernels keep that order,
so both give the same bits (but for 8-bit codes whose value lies within rounding of the middle between two).
"""

from __future__ import annotations

import torch

from progtuning_kernels import quantization, rounding
from progtuning_kernels.buffers import STATE_BLOCK, FlatBuffer
from progtuning_kernels.control import Control
from progtuning_kernels.worklist import ActivePiece, WorkList

CHUNK = 32 * 1024
"""Elements worked on at a time, per thread: their operands stay in a core's cache. A multiple of 256."""


def masked_norm_(work: WorkList, out: torch.Tensor) -> None:
    """Write the sum of squares of the active gradients to ``out``, fp64 [1]; NaN or inf if one of them is.

    Squares of fp32 numbers are exact in fp64 and cannot overflow it, so the sum is finite if all gradients are.
    """
    sums = [
        gradient.to(torch.float64).square_().sum()
        for piece in work.active_pieces()
        for gradient in piece.gradient.split(chunk_size())
    ]
    out.copy_(torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64))


def finalize_(control: Control) -> None:
    """Decide about the step, in fp64: from ``sum_of_squares`` and the settings to all else in ``control``.

    Gradients are scaled by ``1 / (loss_scale * max(1, (norm + 1e-6) / max_norm))``, which is how DeepSpeed unscales
    and clips (``stage_1_and_2.py``, ``unscale_and_clip_grads``). A step with NaN or inf counts for no group.
    """
    valid = control.sum_of_squares.isfinite()
    loss_scale, max_norm = control.limits[0:1], control.limits[1:2]
    control.skip.copy_(~valid)
    control.skipped.add_((~valid).long())
    control.noise_key.copy_((control.seed + control.updates * rounding.KEY_STEP) & 0xFFFFFFFF)
    control.updates.add_(valid.long())
    control.steps.add_(control.active * valid)
    control.norm.copy_(control.sum_of_squares.sqrt() / loss_scale)
    excess = torch.where(max_norm > 0, (control.norm + 1e-6) / max_norm, torch.ones_like(max_norm)).clamp(min=1.0)
    control.grad_scale.copy_(1.0 / (loss_scale * excess))
    lr, beta1, beta2, eps, weight_decay = control.hyper.unbind(dim=1)
    steps = control.steps.clamp(min=1)
    columns = (
        1.0 - lr * weight_decay,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / (1.0 - integer_power(beta2, steps)).sqrt(),
        eps,
        lr / (1.0 - integer_power(beta1, steps)),
        torch.zeros_like(lr),
    )
    control.scalars.copy_(torch.stack(columns, dim=1))


def masked_adamw_(work: WorkList, control: Control) -> None:
    """Update the active elements as ``control`` says; nothing at all is written if it says skip.

    Waits for the device to read the decision, which the Triton kernel does not.
    """
    if control.skip.item():
        return
    scale = control.grad_scale.item()
    key = int(control.noise_key.item())
    scalars = control.scalars.tolist()
    for piece in work.active_pieces():
        size = chunk_size()
        for start in range(piece.start, piece.stop, size):
            _update_chunk(piece, start, min(start + size, piece.stop), scale, scalars[piece.group], key)


def adamw_(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scale: float, scalars: list[float]
) -> None:
    """One AdamW update (arXiv 1711.05101) of fp32 ``p``, ``m``, ``v`` [n]; ``g`` [n] is of any dtype, and scaled.

    The square root takes the way over fp64, because in fp32 on the CPU it is one unit off in every sixth case (MKL).
    """
    decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, step_size, _ = scalars
    g = g.to(torch.float32).mul(scale)
    p.mul_(decay)
    step = torch.sub(g, m).mul_(one_minus_beta1)
    m.add_(step)
    g.mul_(g).mul_(one_minus_beta2)
    v.mul_(beta2).add_(g)
    g.copy_(v.to(torch.float64).sqrt_()).mul_(correction).add_(eps)
    torch.mul(m, step_size, out=step).div_(g)
    p.sub_(step)


def integer_power(base: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Return ``base ** exponent`` for fp64 [n] and int64 [n] below 2**31, by squaring: the same on every device."""
    result = torch.ones_like(base)
    for bit in range(31):
        result = torch.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


def chunk_size() -> int:
    """Elements to work on at a time: few enough for the caches, enough for every thread."""
    return CHUNK * torch.get_num_threads()


def _update_chunk(piece: ActivePiece, start: int, stop: int, scale: float, scalars: list[float], key: int) -> None:
    buffer = piece.buffer
    span = slice(start, stop)
    gradient = piece.gradient[start - piece.start : stop - piece.start]
    master = _master(buffer, span)
    if not buffer.eight_bit:
        adamw_(master, buffer.exp_avg[span], buffer.exp_avg_sq[span], gradient, scale, scalars)
    else:
        _adamw_8bit_(buffer, span, master, gradient, scale, scalars)
    _store_weight(buffer, span, master, piece.index + start - piece.start, key)


def _master(buffer: FlatBuffer, span: slice) -> torch.Tensor:
    if buffer.master is not None:
        return buffer.master[span]
    assert buffer.weight is not None
    weight = buffer.weight[span]
    return weight.to(torch.float32) if buffer.remainder is None else rounding.join(weight, buffer.remainder[span])


def _store_weight(buffer: FlatBuffer, span: slice, master: torch.Tensor, index: int, key: int) -> None:
    if buffer.weight is None:
        return
    weight = buffer.weight[span]
    if buffer.master is not None:
        weight.copy_(master)
    elif buffer.remainder is not None:
        rounding.split(master, weight, buffer.remainder[span])
    else:
        noise = rounding.noise(index, index + master.numel(), key, master.device)
        weight.copy_(rounding.round_stochastically(master, noise))


def _adamw_8bit_(
    buffer: FlatBuffer, span: slice, p: torch.Tensor, g: torch.Tensor, scale: float, scalars: list[float]
) -> None:
    """`adamw_` with state that is decoded before and encoded after; a piece begins with a block of state."""
    assert buffer.absmax is not None
    assert buffer.absmax_sq is not None
    blocks = slice(span.start // STATE_BLOCK, -(-span.stop // STATE_BLOCK))
    codes, codes_sq = buffer.exp_avg[span], buffer.exp_avg_sq[span]
    absmax, absmax_sq = buffer.absmax[blocks], buffer.absmax_sq[blocks]
    m = quantization.decode(codes, absmax, signed=True)
    v = quantization.decode(codes_sq, absmax_sq, signed=False)
    adamw_(p, m, v, g, scale, scalars)
    quantization.encode(m, codes, absmax, signed=True)
    quantization.encode(v, codes_sq, absmax_sq, signed=False)
