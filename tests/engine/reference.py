"""The oracle: AdamW over several ranks' batches in one process, in plain torch, that stops updating what is frozen.

Imports neither DeepSpeed nor progtuning_ds. Gradients of frozen parameters are computed and ignored, so that
nothing here depends on ``requires_grad`` or on parameter groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

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
    # fp16 multiplies the loss so that small gradients survive, and divides the sum again.
    loss_scale: float = 1.0
    # ZeRO-3 passes every module's inputs and outputs through autograd functions (DeepSpeed's
    # parameter_offload.py), which changes the order in which autograd sums gradients where paths join.
    wraps_modules: bool = False


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


def train(kind: str, phases: tuple[Phase, ...], world_size: int, numerics: Numerics, device: str = "cpu") -> Run:
    """Train from scratch over all phases and report everything that a test may compare.

    ``device`` is where the ranks compute, so that both sides run the same kernels.
    """
    model = problem.build_model(kind, numerics.weights).to(device)
    if numerics.wraps_modules:
        wrap_modules(model)
    parameters = dict(model.named_parameters())
    may_train = {n for n, p in parameters.items() if p.requires_grad}
    states: dict[str, Moments] = {}
    run = Run()
    ends = {sum(phase.steps for phase in phases[: i + 1]) - 1 for i in range(len(phases))}
    for step in range(sum(phase.steps for phase in phases)):
        trainable = {n: p for n, p in parameters.items() if n in may_train and phase_at(phases, step).trains(n)}
        retarget(states, trainable, numerics, first=step == 0)
        losses, gradients = averaged_gradients(model, trainable, kind, step, world_size, numerics)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        clip = min(1.0, problem.clip(kind) / (norm + 1e-6))
        for name, parameter in trainable.items():
            lr = problem.BASE_LR * problem.lr_factor(step)
            decay = problem.WEIGHT_DECAY if problem.decays(parameter) else 0.0
            adamw(states[name], gradients[name] * clip, lr, decay)
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
            loss = model(**{k: v.to(model.device) for k, v in inputs.items()}).loss
            losses[rank].append(loss.item())
            model.zero_grad()
            (loss / problem.ACCUMULATION * numerics.loss_scale).backward()
            for name, parameter in trainable.items():
                sums[rank][name] += parameter.grad.to(numerics.accumulate)
        if numerics.reduce_every_micro_batch or micro == problem.ACCUMULATION - 1:
            for name in total:
                total[name] += mean_over_ranks([s[name] for s in sums], numerics)
                for rank_sums in sums:
                    rank_sums[name].zero_()
    means = {n: t.to(numerics.masters) / numerics.loss_scale for n, t in total.items()}
    return [loss for rank in losses for loss in rank], means


def mean_over_ranks(gradients: list[torch.Tensor], numerics: Numerics) -> torch.Tensor:
    """What an all-reduce gives: each share divided and rounded to the traffic's dtype, then summed."""
    shares = [g.to(numerics.reduce) / len(gradients) for g in gradients]
    return sum(shares[1:], shares[0]).to(numerics.accumulate)


def adamw(state: Moments, gradient: torch.Tensor, lr: float, decay: float) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) on the master, in place."""
    beta1, beta2 = problem.BETAS
    state.step += 1
    if state.master.dtype != torch.float32:  # where it is rounded on the way is torch's choice
        torch_adamw(state, gradient, lr, decay)
        return
    state.master.mul_(1 - lr * decay)
    state.exp_avg.mul_(beta1).add_(gradient * (1 - beta1))
    state.exp_avg_sq.mul_(beta2).add_(gradient * gradient * (1 - beta2))
    mean = state.exp_avg / (1 - beta1**state.step)
    root = (state.exp_avg_sq / (1 - beta2**state.step)).sqrt()
    state.master.sub_(lr * mean / (root + problem.EPS))


def torch_adamw(state: Moments, gradient: torch.Tensor, lr: float, decay: float) -> None:
    """The same by torch's own function, for this one parameter."""
    from torch.optim.adamw import adamw as by_torch

    by_torch(
        *([tensor] for tensor in (state.master, gradient.contiguous(), state.exp_avg, state.exp_avg_sq)),
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(float(state.step - 1))],
        foreach=False,
        amsgrad=False,
        beta1=problem.BETAS[0],
        beta2=problem.BETAS[1],
        lr=lr,
        weight_decay=decay,
        eps=problem.EPS,
        maximize=False,
    )


class Identity(torch.autograd.Function):
    """A node in the graph that does nothing."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def wrap_modules(model: torch.nn.Module) -> None:
    """Put an ``Identity`` on every positional input and every output of every module."""
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: wrapped(inputs))
        module.register_forward_hook(lambda _, inputs, output: wrapped(output))


def wrapped(value: Any) -> Any:
    """The same structure with every tensor in it behind an ``Identity``."""
    if isinstance(value, torch.Tensor):
        return Identity.apply(value)
    if isinstance(value, (tuple, list)):
        return type(value)(wrapped(item) for item in value)
    if isinstance(value, dict):  # a model's output, which is a class of its own: changed in place
        for key in value:
            value[key] = wrapped(value[key])
    return value
