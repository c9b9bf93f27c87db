"""The oracle: AdamW over several ranks' batches in one process, in plain torch, that stops updating what is frozen.

Imports neither DeepSpeed nor progtuning_ds. Gradients of frozen parameters are computed and ignored, so that
nothing here depends on ``requires_grad`` or on parameter groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from tests.engine import problem
from tests.engine.problem import Phase, phase_at


@dataclass(frozen=True)
class Numerics:
    """Where a flavour of DeepSpeed rounds: dtypes of weights, gradient sums and traffic, and the order of sums."""

    weights: torch.dtype = torch.float32
    masters: torch.dtype = torch.float32
    accumulate: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    # ZeRO-2 and 3 average over ranks after every micro-batch; the others once, after summing on each rank.
    reduce_every_micro_batch: bool = False
    # Stage-0 mixed precision runs optimizer.step() on zero gradients while it is built (DeepSpeed's
    # FP16_UnfusedOptimizer.initialize_optimizer_states): Adam starts at step 1, masters are decayed once.
    phantom_step: bool = False


@dataclass
class Moments:
    """Adam's state of one parameter, in the masters' dtype."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int = 0


@dataclass
class Run:
    """What a training run leaves behind, on CPU; filled by the reference and by the ranks alike."""

    losses: list[list[float]] = field(default_factory=list)  # [step][rank * accumulation + micro-batch]
    norms: list[float] = field(default_factory=list)  # [step], before clipping
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)  # [phase], at its end
    masters: dict[str, torch.Tensor] = field(default_factory=dict)  # of what trains at the end
    exp_avg: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, torch.Tensor] = field(default_factory=dict)
    adam_steps: dict[str, int] = field(default_factory=dict)


def train(kind: str, phases: tuple[Phase, ...], world_size: int, numerics: Numerics) -> Run:
    """Train from scratch over all phases and report everything that a test may compare."""
    model = problem.build_model(kind, numerics.weights).to(problem_device())
    parameters = dict(model.named_parameters())
    states: dict[str, Moments] = {}
    run = Run()
    ends = {sum(phase.steps for phase in phases[: i + 1]) - 1 for i in range(len(phases))}
    for step in range(sum(phase.steps for phase in phases)):
        trainable = {n: p for n, p in parameters.items() if phase_at(phases, step).trains(n)}
        retarget(states, trainable, numerics, first=step == 0)
        losses, gradients = averaged_gradients(model, trainable, kind, step, world_size, numerics)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        clip = min(1.0, problem.CLIP[kind] / (norm + 1e-6))
        for name, parameter in trainable.items():
            lr = problem.BASE_LR * problem.lr_factor(step)
            decay = problem.WEIGHT_DECAY if problem.decays(parameter) else 0.0
            adamw(states[name], gradients[name].to(numerics.masters) * clip, lr, decay)
            parameter.data.copy_(states[name].master)
        run.losses.append(losses)
        run.norms.append(norm)
        if step in ends:
            run.weights.append({n: p.detach().cpu().clone() for n, p in parameters.items()})
    run.masters = {n: s.master.cpu() for n, s in states.items()}
    run.exp_avg = {n: s.exp_avg.cpu() for n, s in states.items()}
    run.exp_avg_sq = {n: s.exp_avg_sq.cpu() for n, s in states.items()}
    run.adam_steps = {n: s.step for n, s in states.items()}
    return run


def retarget(
    states: dict[str, Moments], trainable: dict[str, torch.nn.Parameter], numerics: Numerics, *, first: bool
) -> None:
    """Forget the state of what froze; give newcomers a master from their weight, and zero moments."""
    for name in states.keys() - trainable.keys():
        del states[name]
    for name, parameter in trainable.items():
        if name not in states:
            master = parameter.detach().to(numerics.masters).clone()
            states[name] = Moments(master, torch.zeros_like(master), torch.zeros_like(master))
            if first and numerics.phantom_step:
                decay = problem.WEIGHT_DECAY if problem.decays(parameter) else 0.0
                adamw(states[name], torch.zeros_like(master), problem.BASE_LR, decay)


def averaged_gradients(
    model: torch.nn.Module,
    trainable: dict[str, torch.nn.Parameter],
    kind: str,
    step: int,
    world_size: int,
    numerics: Numerics,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all micro-batches, and the mean gradient over ranks and micro-batches."""
    losses: list[list[float]] = [[] for _ in range(world_size)]
    total = {n: torch.zeros_like(p, dtype=numerics.accumulate) for n, p in trainable.items()}
    sums = [{n: torch.zeros_like(t) for n, t in total.items()} for _ in range(world_size)]
    for micro in range(problem.ACCUMULATION):
        for rank in range(world_size):
            inputs = problem.batch(kind, step, micro, rank)
            loss = model(**{k: v.to(problem_device()) for k, v in inputs.items()}).loss
            losses[rank].append(loss.item())
            model.zero_grad()
            (loss / problem.ACCUMULATION).backward()
            for name, parameter in trainable.items():
                sums[rank][name] += parameter.grad.to(numerics.accumulate)
        if numerics.reduce_every_micro_batch or micro == problem.ACCUMULATION - 1:
            for name in total:
                total[name] += mean_over_ranks([s[name] for s in sums], numerics)
                for rank_sums in sums:
                    rank_sums[name].zero_()
    return [loss for rank in losses for loss in rank], total


def mean_over_ranks(gradients: list[torch.Tensor], numerics: Numerics) -> torch.Tensor:
    """What an all-reduce gives: each share divided and rounded to the traffic's dtype, then summed."""
    shares = [g.to(numerics.reduce) / len(gradients) for g in gradients]
    return sum(shares[1:], shares[0]).to(numerics.accumulate)


def adamw(state: Moments, gradient: torch.Tensor, lr: float, decay: float) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) on the master, in place."""
    beta1, beta2 = problem.BETAS
    state.step += 1
    state.master.mul_(1 - lr * decay)
    state.exp_avg.mul_(beta1).add_(gradient * (1 - beta1))
    state.exp_avg_sq.mul_(beta2).add_(gradient * gradient * (1 - beta2))
    mean = state.exp_avg / (1 - beta1**state.step)
    root = (state.exp_avg_sq / (1 - beta2**state.step)).sqrt()
    state.master.sub_(lr * mean / (root + problem.EPS))


def problem_device() -> torch.device:
    """Where the ranks compute, so that both sides run the same kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
