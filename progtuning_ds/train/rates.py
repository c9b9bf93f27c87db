"""What stage boundaries do to the learning rate. Imports torch; no deepspeed."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from progtuning_ds.schedule import StagePlan

Factor = Callable[[int], float]


def boundary_factor(plan: StagePlan, warmup_steps: int, stage_factor: float) -> Factor:
    """Return what the schedule's learning rate is multiplied by at each optimizer step.

    Args:
        plan: what trains when.
        warmup_steps: steps of linear warm-up after each boundary; the first of n has 1/(n+1) of the rate.
        stage_factor: multiplies the rate of each stage by this once more than that of the one before.
    """

    def factor(step: int) -> float:
        # The scheduler looks one step beyond the run, when the last one is done.
        stage = plan.stage_at(min(step, plan.total_steps - 1))
        warm = min(1.0, (step - stage.steps.start + 1) / (warmup_steps + 1)) if stage.index else 1.0
        return stage_factor**stage.index * warm

    return factor


def follow_boundaries(scheduler: LambdaLR, factor: Factor) -> LambdaLR:
    """Multiply every group's schedule by `factor`, which must be 1 at step 0; returns the scheduler."""
    scheduler.lr_lambdas = [_product(schedule, factor) for schedule in scheduler.lr_lambdas]
    return scheduler


def _product(schedule: Factor, factor: Factor) -> Factor:
    return lambda step: schedule(step) * factor(step)
