"""What else updates the same parameters: each rival is prepared once and returns the call to be timed.

DeepSpeed's sequence is what `stage_1_and_2.py` (0.19.8, bf16, clipping, one rank) does between the last gradient and
the all-gather, operation by operation: overflow check, norm, flatten, cast, clip, optimizer, 16-bit copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from masked_step_problem import GROUPS, MAX_NORM, Problem
from torch._utils import _flatten_dense_tensors

Call = Callable[[], object]


def deepspeed_optimizer(groups: list[dict]) -> torch.optim.Optimizer:
    """DeepSpeed's FusedAdam; compiled on first use, which needs nvcc."""
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True)


def named_groups(params: list[list[torch.Tensor]]) -> list[dict]:
    return [
        {"params": p, "lr": hyper.lr, "betas": hyper.betas, "eps": hyper.eps, "weight_decay": hyper.weight_decay}
        for p, hyper in zip(params, GROUPS, strict=True)
    ]


def flat_masters(problem: Problem) -> list[torch.Tensor]:
    return [torch.randn(sum(s.numel() for s in group), device="cuda") for group in problem.shapes]


def deepspeed_sequence(problem: Problem) -> Call:
    masters = flat_masters(problem)
    weights = [master.bfloat16() for master in masters]
    gradients = problem.gradients()
    optimizer = deepspeed_optimizer(named_groups([[master] for master in masters]))

    def step() -> None:
        bad = torch.zeros(1, device="cuda")
        for gradient in (g for group in gradients for g in group):
            bad += torch.isfinite(gradient.amax()).logical_and(torch.isfinite(gradient.amin())).logical_not()
        if bad.bool().byte()[0].item():
            return
        norms = [torch.linalg.vector_norm(g.double()) for group in gradients for g in group]
        norm = torch.stack(norms).pow(2).sum().float().pow(0.5)
        scale = torch.clamp((norm + 1e-6) / MAX_NORM, min=1.0)
        for master, weight, group in zip(masters, weights, gradients, strict=True):
            flat = _flatten_dense_tensors(group).to(torch.float32)
            flat.mul_(1.0 / scale)
            for other in masters:
                other.grad = flat if other is master else None
            optimizer.step()
            master.grad = None
            weight.copy_(master)

    return step


def fused_adam(problem: Problem) -> Call:
    masters = flat_masters(problem)
    for master in masters:
        master.grad = torch.randn_like(master)
    return deepspeed_optimizer(named_groups([[master] for master in masters])).step


def torch_adamw(problem: Problem) -> Call:
    params = [[torch.randn(s, device="cuda") for s in group] for group in problem.shapes]
    every = [p for group in params for p in group]
    for param in every:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(named_groups(params), fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(every, MAX_NORM, foreach=True)
        optimizer.step()

    return step


def bitsandbytes_adamw(problem: Problem) -> Call:
    import bitsandbytes

    params = [[torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in group] for group in problem.shapes]
    for param in (p for group in params for p in group):
        param.grad = torch.randn_like(param)
    return bitsandbytes.optim.AdamW8bit(named_groups(params)).step


RIVALS: dict[str, tuple[Callable[[Problem], Call], str]] = {
    "deepspeed": (deepspeed_sequence, "the same step by ZeRO-1/2, with FusedAdam"),
    "fused-adam": (fused_adam, "DeepSpeed FusedAdam alone, fp32 gradients: no norm, no clipping, no 16-bit copy"),
    "torch": (torch_adamw, "torch AdamW(fused=True) and clip_grad_norm_, fp32: no 16-bit copy"),
    "bitsandbytes": (bitsandbytes_adamw, "AdamW8bit on bf16 weights: no master, no norm, no clipping"),
}
"""What prepares each, and what it does in comparison."""
