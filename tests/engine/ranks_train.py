"""What each rank runs: a DeepSpeed engine on the shared problem, with or without a StageEngine."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.engine import problem
from tests.engine.bytes_held import Held
from tests.engine.flavours import ALL, Flavour
from tests.engine.problem import NUM_BLOCKS, Phase, shrinking
from tests.engine.reference import Run

ALL_BLOCKS = tuple(range(NUM_BLOCKS))
ROTATING = (
    Phase(2, ALL_BLOCKS),
    Phase(2, (1, 3, 5), embeddings=False),
    Phase(2, (0, 1, 2, 5)),
    Phase(2, (4, 5), embeddings=False),
)
GROWING = (Phase(2, (4, 5), embeddings=False), Phase(2, (2, 3, 4, 5), embeddings=False), Phase(2, ALL_BLOCKS))
# What trains when, and whether parameter groups are laid out for the plan or are the ordinary two.
MODES: dict[str, tuple[tuple[Phase, ...], str]] = {
    "planned": (shrinking(), "plan"),
    "ordinary": (shrinking(), "ordinary"),
    "rotating": (ROTATING, "ordinary"),
    "growing": (GROWING, "plan"),
    "embeddings-first": (shrinking(embeddings="first_stage"), "plan"),
    "embeddings-never": (shrinking(embeddings="never"), "ordinary"),
}


@dataclass
class Boundary:
    """What one transition did on this rank, as reported and as seen from outside."""

    transition: Any  # StageTransition
    groups: list[list[list[str]]]  # names in each of DeepSpeed's groups, before and after
    reported: list[dict[str, int]]  # StageEngine.memory() before and after
    held: list[Held]  # counted without it, before and after


@dataclass
class StagedRun(Run):
    """A run through all stages."""

    boundaries: list[Boundary] = field(default_factory=list)
    lrs: list[list[float]] = field(default_factory=list)  # [step][parameter group]


def build_engine(
    flavour: Flavour,
    kind: str = "bert",
    model: torch.nn.Module | None = None,
    groups: list[dict[str, Any]] | None = None,
    lr_scheduler: Any = None,
    scheduled: bool = True,
    **overrides: Any,
) -> Any:
    """A DeepSpeed engine on the shared problem; ordinary groups over everything if none are given.

    Without ``scheduled`` it gets no scheduler but one that ``overrides`` configures.
    """
    import deepspeed

    model = problem.build_model(kind) if model is None else model
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=ordinary_groups(model) if groups is None else groups,
        config=flavour.deepspeed_config(kind) | overrides,
        lr_scheduler=(lr_scheduler or scheduler) if scheduled else None,
    )
    assert type(engine.optimizer).__name__ == flavour.wrapper
    return engine


def build_staged(
    flavour: Flavour,
    phases: tuple[Phase, ...],
    groups: str,
    kind: str = "bert",
    options: dict[str, Any] | None = None,
    **overrides: Any,
) -> tuple[Any, Any]:
    """The same under a StageEngine with ``options``; ``groups`` are those of the plan or the ordinary ones."""
    import progtuning_ds

    model = problem.build_model(kind)
    blocks = progtuning_ds.discover_blocks(model)
    plan = progtuning_ds.custom_plan(
        NUM_BLOCKS, [{"blocks": list(p.blocks), "steps": p.steps, "embeddings": p.embeddings} for p in phases]
    )
    own = progtuning_ds.param_groups(model, plan, blocks, problem.WEIGHT_DECAY) if groups == "plan" else None
    engine = build_engine(flavour, kind, model, own, **overrides)
    return engine, progtuning_ds.StageEngine(engine, plan, blocks, **(options or {}))


def ordinary_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The two groups of every fine-tuning script: one that decays, one that does not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if problem.decays(p)], "weight_decay": problem.WEIGHT_DECAY},
        {"params": [p for p in parameters if not problem.decays(p)], "weight_decay": 0.0},
    ]
    # DeepSpeed drops what does not require grad, and cannot build ZeRO-1 or 2 on a group of which nothing is left.
    return [group for group in groups if any(p.requires_grad for p in group["params"])]


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up and decay as the reference has them."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, problem.lr_factor)


def optimizer_step(engine: Any, kind: str, step: int) -> list[float]:
    """One accumulation window; returns this rank's losses."""
    losses = []
    for micro in range(problem.ACCUMULATION):
        losses.append(micro_step(engine, kind, step, micro))
        engine.step()
    return losses


def micro_step(engine: Any, kind: str, step: int, micro: int) -> float:
    """Forward and backward of one micro-batch."""
    import deepspeed.comm as dist

    inputs = problem.batch(kind, step, micro, dist.get_rank())
    loss = engine(**{k: v.to(engine.device) for k, v in inputs.items()}).loss
    engine.backward(loss)
    return loss.item()


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """The full weights, also where ZeRO-3 has sharded them."""
    import deepspeed

    sharded = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Full weights of the whole model, on CPU."""
    with gathered(engine):
        return {n: p.detach().cpu().clone() for n, p in engine.module.named_parameters()}


def run_until(engine: Any, stages: Any, steps: range, kind: str = "bert") -> list[list[float]]:
    """These steps, each entered through ``stages.advance``; returns this rank's losses."""
    losses = []
    for step in steps:
        stages.advance(step)
        losses.append(optimizer_step(engine, kind, step))
    return losses


def read_state(engine: Any, run: Run, missing_ok: Collection[str] = ()) -> None:
    """Masters and moments of what trains, through DeepSpeed's public functions.

    Parameters in ``missing_ok`` have just joined: they have no moments before their first step.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is None:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        run.masters[name] = master.detach().cpu().clone().view(shape)
        if name in missing_ok:
            continue
        for key, found in (("exp_avg", run.exp_avg), ("exp_avg_sq", run.exp_avg_sq)):
            found[name] = safe_get_full_optimizer_state(parameter, key).detach().cpu().clone().view(shape)


def grad_norm(engine: Any) -> float:
    """The norm before clipping; DeepSpeed tells none where torch's optimizer is used bare (stage 0 in fp32)."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


def train_plain(flavour: str, kind: str, phases: tuple[Phase, ...]) -> Run:
    """DeepSpeed alone, nothing frozen."""
    engine = build_engine(ALL[flavour], kind)
    run = Run()
    for phase in phases:
        for _ in range(phase.steps):
            run.losses.append(optimizer_step(engine, kind, len(run.losses)))
            run.norms.append(grad_norm(engine))
        run.weights.append(weights(engine))
    return run


def enter_phase(engine: Any, stages: Any, step: int) -> Boundary:
    """``stages.advance(step)``, watched."""
    groups, reported, held = [group_names(engine)], [stages.memory()], [Held.by(engine)]
    transition = stages.advance(step)
    groups.append(group_names(engine))
    reported.append(stages.memory())
    held.append(Held.by(engine))
    return Boundary(transition, groups, reported, held)


def group_names(engine: Any) -> list[list[str]]:
    """Names in each of DeepSpeed's parameter groups, or sub-groups in ZeRO-3, by its own lists."""
    names = {id(p): n for n, p in engine.module.named_parameters()}
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(engine.optimizer, attribute):
            return [[names[id(p)] for p in group] for group in getattr(engine.optimizer, attribute)]
    return [[names[id(p)] for p in group["params"]] for group in engine.optimizer.param_groups]


def train_staged(
    flavour: str, kind: str, phases: tuple[Phase, ...], groups: str, kernel: str = "deepspeed"
) -> StagedRun:
    """All phases under a StageEngine, watched from outside at every boundary."""
    engine, stages = build_staged(ALL[flavour], phases, groups, kind, {"kernel": kernel})
    run = StagedRun()
    for phase in phases:
        boundary = enter_phase(engine, stages, len(run.losses))
        if boundary.transition is not None:
            run.boundaries.append(boundary)
        for _ in range(phase.steps):
            step = len(run.losses)
            assert stages.advance(step) is None, "a stage begins once"
            run.lrs.append([group["lr"] for group in engine.optimizer.param_groups])
            run.losses.append(optimizer_step(engine, kind, step))
            run.norms.append(grad_norm(engine))
        run.weights.append(weights(engine))
    read_state(engine, run)
    return run
