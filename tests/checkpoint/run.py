"""What each rank runs: a small BERT with dropout through three stages, saved on the way, resumed from anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engine.flavours import ALL, Flavour
from tests.engine.problem import WEIGHT_DECAY, import_transformers

BLOCKS = 3
STEPS = 2  # of each of three stages
TOTAL = 3 * STEPS
ACCUMULATION = 2
ROWS = 4  # of each accumulated pass, over all ranks
SHRINKING = [{"blocks": "0-2", "steps": STEPS}, {"blocks": "1-2", "steps": STEPS}, {"blocks": "2", "steps": STEPS}]
ROTATING = [
    {"blocks": "0-1", "steps": STEPS},
    {"blocks": "1-2", "steps": STEPS, "embeddings": False},
    {"blocks": "0,2", "steps": STEPS},
]
PLANS = {"shrinking": SHRINKING, "rotating": ROTATING}


@dataclass
class Trained:
    """What a run leaves behind on one rank."""

    losses: dict[int, list[float]] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg: dict[str, torch.Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, torch.Tensor] = field(default_factory=dict)
    lrs: dict[int, list[float]] = field(default_factory=dict)
    draws: tuple[float, float, float] = ()  # type: ignore[assignment]


def build(
    flavour: str, plan: str = "shrinking", dropout: float = 0.1, optimizer: dict[str, Any] | None = None, **model: Any
) -> tuple[Any, Any]:
    """A fresh engine and its stages, as for a start from the beginning."""
    import deepspeed

    import progtuning_ds
    from progtuning_ds.zero.cpu_adam import forget_history

    kind: Flavour = ALL[flavour]
    torch.manual_seed(1234)
    transformers = import_transformers()
    sizes = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2} | model
    config = transformers.BertConfig(
        **sizes,
        intermediate_size=40,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    module = transformers.BertForSequenceClassification(config)
    blocks = progtuning_ds.discover_blocks(module)
    stage_plan = progtuning_ds.custom_plan(BLOCKS, PLANS[plan])
    world_size = torch.distributed.get_world_size()
    settings = kind.deepspeed_config("bert") | {
        "train_micro_batch_size_per_gpu": ROWS // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
    }
    if optimizer is not None:
        settings |= {"optimizer": optimizer, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=progtuning_ds.param_groups(module, stage_plan, blocks, WEIGHT_DECAY),
        config=settings,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _factor),
    )
    forget_history(getattr(engine.optimizer, "optimizer", engine.optimizer))
    torch.manual_seed(7 + torch.distributed.get_rank())
    random.seed(7)
    np.random.seed(7)
    return engine, progtuning_ds.StageEngine(engine, stage_plan, blocks)


def _factor(step: int) -> float:
    return min(1.0, (step + 1) / 4) * (1 - step / 50)


def batch(step: int, micro: int, device: Any) -> dict[str, torch.Tensor]:
    """This rank's rows of a pass; the rows of all ranks together do not depend on how many there are."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(1, 32, (ROWS, 8), generator=generator)
    labels = torch.randint(0, 3, (ROWS,), generator=generator)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = {"input_ids": ids, "labels": labels}
    return {name: values[rank::world_size].to(device) for name, values in rows.items()}


def train(engine: Any, stages: Any, steps: Sequence[int], trained: Trained, folder: str | None = None) -> None:
    """Train some steps; with a folder, save after each that is named in it."""
    from progtuning_ds.checkpoint import save_checkpoint

    engine.train()
    for step in steps:
        stages.advance(step)
        trained.lrs[step] = [group["lr"] for group in stages.adapter.torch_optimizer.param_groups]
        trained.losses[step] = []
        for micro in range(ACCUMULATION):
            loss = engine(**batch(step, micro, engine.device)).loss
            engine.backward(loss)
            engine.step()
            trained.losses[step].append(loss.item())
        random.random()
        np.random.random()
        if folder is not None:
            save_checkpoint(stages, folder, step + 1, program={"step": step + 1}, about={"note": "a test"})


def read(engine: Any, stages: Any, trained: Trained) -> Trained:
    """Weights, masters and moments now, whole, and what the generators would draw next."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from progtuning_ds.train.export import full_state_dict

    trained.weights = full_state_dict(engine.module, keep=True)
    if engine.zero_optimization_stage():
        for name in stages.trainable_names:
            param = stages.adapter.params[name]
            trained.masters[name] = safe_get_full_fp32_param(param).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                getattr(trained, key)[name] = safe_get_full_optimizer_state(param, key).clone()
    trained.draws = (random.random(), float(np.random.random()), torch.rand(1).item())
    return trained


def train_through(flavour: str, plan: str, folder: str, **options: Any) -> Trained:
    """The uninterrupted run, which saves after every step."""
    engine, stages = build(flavour, plan, **options)
    trained = Trained()
    train(engine, stages, range(TOTAL), trained, folder)
    return read(engine, stages, trained)


def resume_and_finish(
    flavour: str, plan: str, folder: str, steps: Sequence[int], mixed_up: bool = True, **options: Any
) -> list[Trained]:
    """For each step, a fresh engine that goes on from the checkpoint made after it."""
    from progtuning_ds.checkpoint import CheckpointStore, load_checkpoint

    results = []
    for step in steps:
        engine, stages = build(flavour, plan, **options)
        if mixed_up:
            torch.manual_seed(99)
            with torch.no_grad():  # nothing of a fresh model may be left
                for place in _weights(stages):
                    place.add_(1.0)
        found = load_checkpoint(stages, CheckpointStore(Path(folder)).path(step))
        assert found.step == step
        assert found.program == {"step": step}
        trained = Trained()
        train(engine, stages, range(step, TOTAL), trained)
        results.append(read(engine, stages, trained))
        engine.destroy()
    return results


def _weights(stages: Any) -> list[torch.Tensor]:
    from progtuning_ds.zero.held_state import held_weights

    return [place.tensor for place in held_weights(stages.adapter)]
