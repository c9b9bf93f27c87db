"""Learning-rate schedulers go on after transitions, each group with its own rate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from tests.engine import problem
from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import MODES, StagedRun, build_engine, optimizer_step
from tests.ranks import RankPools

STEPS = 6


def lambda_lr(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [problem.lr_factor] * len(optimizer.param_groups))


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    rates = [group["lr"] for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=STEPS, cycle_momentum=False)


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=3),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=3),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def warmup_decay(optimizer: torch.optim.Optimizer) -> Any:
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    rates = [group["lr"] for group in optimizer.param_groups]
    return WarmupDecayLR(optimizer, STEPS, [0.1 * r for r in rates], rates, warmup_num_steps=3, warmup_type="linear")


SCHEDULERS = {"lambda": lambda_lr, "one-cycle": one_cycle, "sequential": sequential, "warmup-decay": warmup_decay}


def rates_under_stages(flavour: str, scheduler: str, own: bool) -> list[dict[str, float]]:
    """Rate of each named group at each step; with ``own`` the engine does not know the scheduler."""
    import progtuning_ds

    model = problem.build_model("bert")
    blocks = progtuning_ds.discover_blocks(model)
    plan = progtuning_ds.plan_stages(6, 3, STEPS)
    groups = progtuning_ds.param_groups(model, plan, blocks, problem.WEIGHT_DECAY)
    for index, group in enumerate(groups):
        group["lr"] = problem.BASE_LR / (1 + index)
    make = SCHEDULERS[scheduler]
    engine = build_engine(ALL[flavour], model=model, groups=groups, lr_scheduler=make, scheduled=not own)
    mine = make(engine.basic_optimizer) if own else None
    stages = progtuning_ds.StageEngine(engine, plan, blocks, lr_scheduler=mine)
    rates = []
    for step in range(STEPS):
        stages.advance(step)
        rates.append({group["name"]: group["lr"] for group in engine.optimizer.param_groups})
        optimizer_step(engine, "bert", step)
        if mine is not None:
            mine.step()
    return rates


def rates_of_a_bare_optimizer(scheduler: str) -> list[dict[str, float]]:
    """The same groups and scheduler with no engine and no stage."""
    import progtuning_ds

    model = problem.build_model("bert")
    plan = progtuning_ds.plan_stages(6, 3, STEPS)
    groups = progtuning_ds.param_groups(model, plan, progtuning_ds.discover_blocks(model), problem.WEIGHT_DECAY)
    for index, group in enumerate(groups):
        group["lr"] = problem.BASE_LR / (1 + index)
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "scheduler", "own"),
    [
        *(("zero2-bf16", scheduler, own) for scheduler in SCHEDULERS for own in (False, True)),
        ("zero0-fp32", "one-cycle", False),
        ("zero3-fp32", "sequential", True),
    ],
)
def test_each_group_keeps_its_rate_through_the_stages(ranks: RankPools, name: str, scheduler: str, own: bool) -> None:
    (expected,) = ranks(1).run(rates_of_a_bare_optimizer, scheduler=scheduler)
    lives = {"always": 6, "part1": 4, "part0": 2}
    for rates in ranks(2).run(rates_under_stages, flavour=name, scheduler=scheduler, own=own):
        for step in range(STEPS):
            alive = {group: rate for group, rate in expected[step].items() if step < lives[group.split(".")[0]]}
            assert rates[step] == pytest.approx(alive, rel=1e-9)
    assert len({round(rate, 12) for rate in expected[2].values()}) == 6, "every group has a rate of its own"


@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
def test_a_group_that_comes_back_takes_todays_rate(staged_runs, name: str) -> None:
    phases, _ = MODES["rotating"]
    run: StagedRun = staged_runs(name, "rotating")[0]
    for step in range(sum(phase.steps for phase in phases)):
        today = problem.BASE_LR * problem.lr_factor(step)
        assert run.lrs[step] == pytest.approx([today] * len(run.lrs[step]), rel=1e-9)


def train_with_a_schedule_from_the_configuration(flavour: str) -> list[list[float]]:
    from tests.engine.ranks_train import build_staged

    schedule = {"total_num_steps": STEPS, "warmup_num_steps": 3, "warmup_type": "linear", "warmup_max_lr": 1e-3}
    engine, stages = build_staged(
        ALL[flavour], shrinking(), "plan", scheduled=False, scheduler={"type": "WarmupDecayLR", "params": schedule}
    )
    rates = []
    for step in range(STEPS):
        stages.advance(step)
        rates.append(engine.get_lr())
        optimizer_step(engine, "bert", step)
    return rates


@pytest.mark.parametrize("name", ["zero1-fp32", "zero3-fp32"])
def test_a_schedule_in_the_configuration_goes_on(ranks: RankPools, name: str) -> None:
    """DeepSpeed's formula: from step 1 on linear to the maximum in 3 steps, then linear to zero."""
    for rates in ranks(2).run(train_with_a_schedule_from_the_configuration, flavour=name):
        assert [len(r) for r in rates] == [6] * 2 + [4] * 2 + [2] * 2
        assert all(rate == r[0] for r in rates for rate in r)
        peak = max(r[0] for r in rates)
        assert peak == pytest.approx(1e-3)
        falling = [r[0] for r in rates[[r[0] for r in rates].index(peak) :]]
        slopes = [a - b for a, b in itertools.pairwise(falling)]
        assert slopes == pytest.approx([1e-3 / (STEPS - 3)] * len(slopes))
