"""What each rank runs: an engine through all stages of a plan, and what it held in each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine import problem
from tests.engine.flavours import ALL
from tests.engine.problem import Phase, shrinking
from tests.engine.ranks_train import build_staged, optimizer_step


def phases_above(never: int, embeddings: str) -> tuple[Phase, ...]:
    """Stages of a step each, as the paper has them but for the lowest ``never`` blocks, which train in none."""
    return tuple(
        replace(phase, blocks=tuple(block for block in phase.blocks if block >= never))
        for phase in shrinking(steps=1, embeddings=embeddings)
    )


def held_by_stage(
    flavour: str, kind: str = "bert", embeddings: str = "always", on_freeze: str = "keep", never: int = 0
) -> list[dict[str, int]]:
    """``StageEngine.memory()`` after a step of every stage."""
    phases = phases_above(never, embeddings)
    engine, stages = build_staged(ALL[flavour], phases, "plan", kind, {"on_freeze": on_freeze})
    held = []
    for step in range(len(phases)):
        stages.advance(step)
        optimizer_step(engine, kind, step)
        held.append(stages.memory())
    return held


def workload(kind: str, embeddings: str = "always", never: int = 0) -> Any:
    """The same problem as the model of memory sees it."""
    from progtuning_ds import custom_plan, discover_blocks
    from progtuning_ds.memory import Workload
    from progtuning_ds.model_shape import architecture, param_table

    model = problem.build_model(kind)
    blocks = discover_blocks(model)
    stages = [
        {"blocks": list(phase.blocks), "steps": phase.steps, "embeddings": phase.embeddings}
        for phase in phases_above(never, embeddings)
    ]
    plan = custom_plan(problem.NUM_BLOCKS, stages)
    return Workload(param_table(model, blocks), architecture(model, blocks), plan)
