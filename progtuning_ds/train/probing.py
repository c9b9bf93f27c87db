"""Measures what each block contributes: trained alone, or by its gradient in one pass. No deepspeed.runtime.

After the first figure of the paper (arXiv 2506.21119), which trains embeddings and one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import set_seed

from progtuning_ds.blocks import discover_blocks
from progtuning_ds.config import RunConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import custom_plan
from progtuning_ds.train.assembly import build
from progtuning_ds.train.batches import step_batches
from progtuning_ds.train.engine_config import check_engine_config
from progtuning_ds.train.evaluate import evaluate
from progtuning_ds.train.job import Job, prepare_job
from progtuning_ds.train.losses import StepLoss
from progtuning_ds.train.models import load_model
from progtuning_ds.train.ranks import Ranks, hardware, start_ranks


@dataclass(frozen=True, slots=True)
class BlockProbe:
    """What one block contributes.

    Attributes:
        block: its index; None for embeddings and head alone, against which blocks are compared.
        contribution: the main metric after training (its gain over embeddings and head alone), or with the fast
            estimate the block's share of the squared gradient norm of all blocks.
        metrics: all scores on the validation rows; none with the fast estimate.
    """

    block: int | None
    contribution: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Probe:
    """All blocks, lowest first; `measure` says what their contributions are."""

    measure: str
    steps: int
    blocks: tuple[BlockProbe, ...]


def run_probe(
    config: RunConfig, *, steps: int | None = None, fast: bool = False, tell: Callable[[str], None] = lambda line: None
) -> Probe:
    """Probe every block of a run's model on its data. Called by every rank.

    Args:
        config: the run; its schedule does not matter, nothing is saved.
        steps: optimizer steps for each block (with `fast`: in all); by default those of the run.
        fast: estimate by gradients in one pass instead of training once per block. Needs a model that fits on each
            rank with its gradients, whatever the ZeRO stage.
        tell: told a line after each block, on every rank.

    Raises:
        ConfigError: one line on what is wrong, before any weight is loaded.
    """
    ranks = start_ranks()
    job = ranks.local_first(lambda: _prepare(config, ranks))
    steps = min(steps or job.plan.total_steps, job.plan.total_steps)
    return _by_gradient(job, ranks, steps) if fast else _by_training(job, ranks, steps, tell)


def _prepare(config: RunConfig, ranks: Ranks) -> Job:
    job = prepare_job(config, hardware(ranks))
    check_engine_config(job.deepspeed, job.deepspeed_name)
    if config.method.kind != "full":
        raise ConfigError(f"method.kind must be full for a probe, got {config.method.kind}")
    return job


def _by_training(job: Job, ranks: Ranks, steps: int, tell: Callable[[str], None]) -> Probe:
    metric = job.task.main_metric
    alone = _train(job, ranks, None, steps)
    tell(f"embeddings and head: {metric} {alone[metric]:.4f}")
    found = [BlockProbe(None, 0.0, alone)]
    for block in range(len(job.blocks)):
        metrics = _train(job, ranks, block, steps)
        gain = metrics[metric] - alone[metric]
        tell(f"block {block}: {metric} {metrics[metric]:.4f} ({gain:+.4f})")
        found.append(BlockProbe(block, gain, metrics))
    return Probe(f"gain in {metric} over training embeddings and head alone", steps, tuple(found))


def _train(job: Job, ranks: Ranks, block: int | None, steps: int) -> dict[str, float]:
    """Train embeddings, head and one block, or none, from the pretrained weights; return the scores."""
    blocks = [] if block is None else [block]
    total = job.plan.total_steps
    one = replace(job, plan=custom_plan(len(job.blocks), [{"blocks": blocks, "steps": total, "embeddings": True}]))
    built = build(one, ranks)
    try:
        built.engine.train()
        step_loss = StepLoss(one.task, ranks)
        for step, batches in enumerate(islice(step_batches(one, ranks), steps)):
            built.stages.advance(step)
            step_loss.begin(batches)
            for batch in batches:
                loss = step_loss(built.engine, batch, len(batches))
                built.engine.backward(loss)
                built.engine.step()
        rows = one.task.evaluations["validation"]
        return evaluate(one.task, built.engine, rows, ranks, one.settings.eval_batch_size)[0]
    finally:
        built.close()


def _by_gradient(job: Job, ranks: Ranks, steps: int) -> Probe:
    set_seed(job.config.train.seed)
    model: Any = load_model(job.task.auto_class, job.config.model, job.shape, job.settings.precision)
    model.to(ranks.device)
    model.eval()  # the gradient of the loss itself, without dropout's noise
    blocks = discover_blocks(model, path=job.config.model.blocks)
    step_loss, passes = StepLoss(job.task, ranks), 0
    for batches in islice(step_batches(job, ranks), steps):
        step_loss.begin(batches)
        for batch in batches:
            step_loss(model, batch, len(batches)).backward()
            passes += 1
    parameters = dict(model.named_parameters())
    squares = []
    for names in blocks.blocks:
        total = torch.zeros((), dtype=torch.float64)
        for name in names:
            gradient = parameters[name].grad
            if gradient is None:
                continue
            mean = gradient.float() / passes
            dist.all_reduce(mean)
            total += (mean / ranks.world_size).double().square().sum().cpu()
        squares.append(float(total))
    whole = sum(squares) or 1.0
    found = tuple(BlockProbe(index, value / whole, {}) for index, value in enumerate(squares))
    return Probe("share of the blocks' squared gradient norm at the pretrained weights", steps, found)


def draw_probe(probe: Probe, path: Path) -> None:
    """Draw the contribution of each block as bars, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [one for one in probe.blocks if one.block is not None]
    axes.bar([str(one.block) for one in shown], [one.contribution for one in shown], color="#0072B2")
    axes.set_xlabel("block")
    axes.set_ylabel("contribution")
    axes.set_title(f"{probe.measure} ({probe.steps} steps)", fontsize=10)
    axes.grid(alpha=0.2, axis="y")
    figure.savefig(path, dpi=120)
