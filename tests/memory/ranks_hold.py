"""What each rank runs: an engine through all stages of a plan, and what it held in each."""

from __future__ import annotations

from typing import Any

from tests.engine import problem
from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import build_staged, optimizer_step


def held_by_stage(
    flavour: str, kind: str = "bert", embeddings: str = "always", on_freeze: str = "keep"
) -> list[dict[str, int]]:
    """``StageEngine.memory()`` after a step of every stage."""
    phases = shrinking(steps=1, embeddings=embeddings)
    engine, stages = build_staged(ALL[flavour], phases, "plan", kind, {"on_freeze": on_freeze})
    held = []
    for step in range(len(phases)):
        stages.advance(step)
        optimizer_step(engine, kind, step)
        held.append(stages.memory())
    return held


def workload(kind: str, embeddings: str = "always") -> Any:
    """The same problem as the model of memory sees it."""
    from progtuning_ds import discover_blocks, plan_stages
    from progtuning_ds.memory import Workload
    from progtuning_ds.model_shape import architecture, param_table

    model = problem.build_model(kind)
    blocks = discover_blocks(model)
    return Workload(param_table(model, blocks), architecture(model, blocks), plan_stages(6, 3, 3, embeddings))
