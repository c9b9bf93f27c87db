"""Draws a run from its records. Imports matplotlib when called; no torch, no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from progtuning_ds.train.records import (
    EvaluationRecord,
    RunRecord,
    StageRecord,
    StepRecord,
    read_records,
)

# Told apart without colour vision (Okabe and Ito's palette).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999")


def draw_training(folder: Path, path: Path) -> None:
    """Draw loss, main metric and optimizer state over a run, with its stage boundaries, to a PNG.

    Args:
        folder: a run directory.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    steps = read_records(folder, StepRecord)
    stages = read_records(folder, StageRecord)
    run = read_records(folder, RunRecord)[-1]
    # A figure of its own instead of pyplot: no display, no global state.
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores, memory = figure.subplots(3, 1, sharex=True)
    x = [record.step + 1 for record in steps]
    losses.plot(x, [record.loss for record in steps], color=_COLOURS[0], linewidth=0.6, alpha=0.4)
    losses.plot(x, _smooth([record.loss for record in steps]), color=_COLOURS[0], label="training loss, smoothed")
    losses.set_ylabel("loss")
    losses.legend(loc="lower left")
    _draw_scores(scores, read_records(folder, EvaluationRecord), run.main_metric)
    _draw_state(memory, stages)
    memory.set_xlabel("optimizer step")
    for axes in (losses, scores, memory):
        axes.grid(alpha=0.2)
        for stage in stages[1:]:
            axes.axvline(stage.first_step, color="black", linestyle=":", linewidth=1)
    for stage in stages:
        middle = stage.first_step + stage.steps / 2
        words = f"stage {stage.stage + 1}\n{EngFormatter(places=1)(stage.trainable_params)} train"
        losses.annotate(words, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    figure.suptitle(f"{run.kind}: {run.saving:.1%} of updated parameters saved")
    figure.savefig(path, dpi=120)


def _draw_scores(axes: Any, evaluations: Sequence[EvaluationRecord], metric: str) -> None:
    for colour, split in zip(_COLOURS[1:], dict.fromkeys(record.split for record in evaluations), strict=False):
        own = [record for record in evaluations if record.split == split]
        x = [record.step + 1 for record in own]
        axes.plot(x, [record.metrics[metric] for record in own], "o-", color=colour, label=split)
    axes.set_ylabel(metric)
    axes.legend(loc="lower right")


def _draw_state(axes: Any, stages: Sequence[StageRecord]) -> None:
    categories = [name for name in stages[0].memory if any(stage.memory[name] for stage in stages)]
    base = [0.0] * len(stages)
    left = [stage.first_step for stage in stages]
    width = [stage.steps for stage in stages]
    for index, category in enumerate(categories):
        heights = [stage.memory[category] / 2**20 for stage in stages]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.bar(left, heights, width, base, align="edge", color=colour, label=category, edgecolor="white")
        base = [below + height for below, height in zip(base, heights, strict=True)]
    axes.set_ylabel("MiB on rank 0")
    axes.set_ylim(0, 1.3 * max(base))  # room for the legend
    axes.legend(loc="upper center", ncols=len(categories), fontsize=8)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start as in Adam."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
