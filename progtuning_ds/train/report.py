"""Writes one HTML page about a finished run from its records, pictures included. No torch, no deepspeed.

For somebody who was not there: every figure says what it shows and in which unit. The page needs no other file and
no network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progtuning_ds.config import load_run_config
from progtuning_ds.memory import STATES, format_bytes
from progtuning_ds.train.memory_plot import stack_bars
from progtuning_ds.train.records import (
    EvaluationRecord,
    MemoryRecord,
    RunRecord,
    StageRecord,
    StepRecord,
    read_records,
)
from progtuning_ds.train.run_dir import CONFIG

PAGE, PICTURES = "report.html", "report"
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
_STATES = (*STATES, "gradients")


@dataclass(frozen=True)
class _Run:
    run: RunRecord
    stages: Sequence[StageRecord]
    memory: Sequence[MemoryRecord]
    steps: Sequence[StepRecord]
    evaluations: Sequence[EvaluationRecord]
    about: str
    """Model and data, in words."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and the pictures in ``report/`` to a run directory that holds a complete run.

    Args:
        folder: the run directory; its records are read.

    Returns:
        The page.
    """
    found = _Run(
        read_records(folder, RunRecord)[-1],
        read_records(folder, StageRecord),
        read_records(folder, MemoryRecord),
        read_records(folder, StepRecord),
        read_records(folder, EvaluationRecord),
        _about(folder),
    )
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    sections = [
        _figure(pictures, title, words, draw, found) for title, words, draw, wanted in _FIGURES if wanted(found)
    ]
    page = folder / PAGE
    page.write_text(_page(found, sections), encoding="utf-8")
    return page


def _about(folder: Path) -> str:
    """Model and data as the run's configuration names them, where it is there."""
    path = folder / CONFIG
    if not path.exists():
        return ""
    config = load_run_config(path)
    data = config.data.train_file or config.data.source or "the task's own data"
    method = "" if config.method.kind == "full" else f" with {config.method.kind}"
    return f"Model {config.model.path}{method}, task {config.task.kind}, trained on {data}. "


# ---- figures ---------------------------------------------------------------------------------------------------


def _memory(axes: Any, found: _Run) -> None:
    bars, labels = [], []
    on_device = found.run.device != "cpu"
    for record in found.memory:
        measured = {name: record.measured.get(name, 0) for name in _STATES}
        if on_device:
            measured["activations"] = max(0, record.measured_peak - sum(measured.values()))
        bars += [record.predicted, measured]
        labels += [f"stage {record.stage + 1}\npredicted", f"stage {record.stage + 1}\nmeasured"]
    last = found.memory[-1]
    stack_bars(axes, bars, labels, budget=last.budget, reserve=last.reserve if last.budget else 0)


def _loss(axes: Any, found: _Run) -> None:
    x = [record.step + 1 for record in found.steps]
    loss = [record.loss for record in found.steps]
    axes.plot(x, loss, color=_BLUE, linewidth=0.6, alpha=0.4)
    axes.plot(x, _smooth(loss), color=_BLUE, label="training loss, smoothed")
    axes.set_ylabel("loss")
    axes.legend(loc="best", fontsize=8)
    _stage_lines(axes, found)


def _metric(axes: Any, found: _Run) -> None:
    for colour, split in zip((_ORANGE, _GREEN), dict.fromkeys(r.split for r in found.evaluations), strict=False):
        own = [record for record in found.evaluations if record.split == split]
        scores = [record.metrics[found.run.main_metric] for record in own]
        axes.plot([record.step + 1 for record in own], scores, "o-", color=colour, label=split)
    axes.set_ylabel(found.run.main_metric)
    axes.legend(loc="best", fontsize=8)
    _stage_lines(axes, found)


def _updated(axes: Any, found: _Run) -> None:
    from matplotlib.ticker import EngFormatter

    x = range(len(found.stages))
    axes.bar(x, [stage.trainable_params for stage in found.stages], 0.6, color=_GREEN)
    axes.axhline(found.stages[0].trainable_params, color=_GREY, linestyle="--", label="as in stage 1")
    axes.set_xticks(list(x), [f"stage {stage.stage + 1}\n{stage.steps} steps" for stage in found.stages])
    axes.set_ylabel("parameters updated per step")
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.legend(loc="best", fontsize=8)


def _throughput(axes: Any, found: _Run) -> None:
    x = [record.step + 1 for record in found.steps]
    axes.plot(x, [record.samples_per_second for record in found.steps], color=_BLUE, linewidth=0.5, alpha=0.4)
    for stage in found.stages:
        ends = (stage.first_step + 1, stage.first_step + stage.steps)
        label = "mean of the stage" if stage.stage == 0 else None
        axes.plot(ends, [stage.samples_per_second] * 2, color=_BLUE, linewidth=2, label=label)
    axes.set_ylabel("rows per second, all ranks")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
    _stage_lines(axes, found)


def _transitions(axes: Any, found: _Run) -> None:
    later = found.stages[1:]
    x = list(range(len(later)))
    released = [sum(stage.released_bytes.values()) / 2**20 for stage in later]
    axes.bar([place - 0.2 for place in x], released, 0.4, color=_GREEN, label="released on each rank")
    moved = [stage.moved_bytes / 2**20 for stage in later]
    axes.bar([place + 0.2 for place in x], moved, 0.4, color=_ORANGE, label="moved between ranks")
    names = [f"stage {stage.stage} to {stage.stage + 1}\n{1000 * stage.transition_seconds:.0f} ms" for stage in later]
    for offset, sizes in ((-0.2, released), (0.2, moved)):
        for place, size in zip(x, sizes, strict=True):
            axes.annotate(format_bytes(size * 2**20), (place + offset, size), ha="center", va="bottom", fontsize=9)
    axes.margins(y=0.1)
    axes.set_xticks(x, names)
    axes.set_ylabel("MiB")
    axes.legend(loc="best", fontsize=8)


_Draw = Callable[[Any, _Run], None]
_FIGURES: tuple[tuple[str, str, _Draw, Callable[[_Run], bool]], ...] = (
    (
        "Memory by stage",
        "What rank 0 held in each stage: as predicted before the run, at the moment that needs most, beside what was "
        "measured. On GPUs the measured activations are all that the allocator's peak holds beyond the states; on "
        "CPUs only the states are measured by category.",
        _memory,
        lambda found: bool(found.memory),
    ),
    (
        "Training loss",
        "Mean loss of every optimizer step over all ranks; dotted lines are where a stage began and blocks froze.",
        _loss,
        lambda found: bool(found.steps),
    ),
    (
        "Quality",
        "The main metric on rows that are not trained on, after every epoch and stage.",
        _metric,
        lambda found: bool(found.evaluations),
    ),
    (
        "Updated parameters",
        "How many parameters one optimizer step updates in each stage.",
        _updated,
        lambda found: bool(found.stages),
    ),
    (
        "Throughput",
        "Rows trained per second. Frozen blocks need no gradients of their weights, and no backward at all where it "
        "stops above them; more rows per pass, where freed memory allows them, keep the device busier.",
        _throughput,
        lambda found: bool(found.steps),
    ),
    (
        "Transitions",
        "What each boundary between two stages gave back on a rank, and what it had to move between ranks.",
        _transitions,
        lambda found: len(found.stages) > 1,
    ),
)


def _stage_lines(axes: Any, found: _Run) -> None:
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.2)
    for stage in found.stages[1:]:
        # Steps count from 1: the boundary is between the last one of a stage and the first one of the next.
        axes.axvline(stage.first_step + 0.5, color="black", linestyle=":", linewidth=1)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _figure(folder: Path, title: str, words: str, draw: _Draw, found: _Run) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots(), found)
    path = folder / f"{title.lower().replace(' ', '_')}.png"
    figure.savefig(path, dpi=110)
    picture = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{picture}"></section>'
    )


# ---- page ------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; } th, td { padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr + tr { border-top: 1px solid #ddd; } p { color: #444; }
"""


def _page(found: _Run, sections: Sequence[str]) -> str:
    run = found.run
    title = f"{run.kind}: {len(found.stages)} stage(s), {run.total_steps} steps"
    versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(_summary(found))}</p>{_table(found)}{''.join(sections)}"
        f"<h2>Made with</h2><p>{html.escape(versions)}</p></body></html>\n"
    )


def _summary(found: _Run) -> str:
    run = found.run
    scores = "; ".join(
        f"{split} {run.main_metric} {metrics[run.main_metric]:.4f}" for split, metrics in run.metrics.items()
    )
    budget = next((record.budget for record in found.memory if record.budget), None)
    limit = f" Budget per rank: {format_bytes(budget)}." if budget else ""
    return (
        f"{found.about}Trained on {run.world_size} rank(s) ({run.device}) in {run.precision} with ZeRO stage "
        f"{run.zero_stage} in {run.seconds:.0f} seconds. It updated {run.updated_params:,} parameters, counted once "
        f"per epoch, instead of {run.updated_params_full:,} without freezing: {run.saving:.1%} saved. "
        f"Last scores: {scores}.{limit} Training goes in stages: at each boundary the lowest blocks that still trained "
        "freeze, and what their training took is released."
    )


def _table(found: _Run) -> str:
    memory = {record.stage: record for record in found.memory}
    columns = (
        "Stage",
        "Steps",
        "Parameters that train",
        "Rows x passes",
        "Rows/s",
        "State per rank",
        "Predicted peak",
        "Process peak" if found.run.device == "cpu" else "Measured peak",
        "Released",
        "Moved",
    )
    rows = []
    for stage in found.stages:
        held = memory.get(stage.stage)
        fell_back = " (fell back)" if held and held.fell_back else ""
        rows.append(
            (
                str(stage.stage + 1),
                str(stage.steps),
                f"{stage.trainable_params:,}",
                f"{held.micro_batch} x {held.accumulation}{fell_back}" if held else "-",
                f"{stage.samples_per_second:.1f}",
                format_bytes(max(stage.state_bytes_per_rank)),
                format_bytes(held.predicted_peak) if held else "-",
                format_bytes(held.measured_peak) if held else "-",
                format_bytes(sum(stage.released_bytes.values())) if stage.released_bytes else "-",
                format_bytes(stage.moved_bytes) if stage.stage else "-",
            )
        )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    words = "Rows x passes: rows per forward pass and rank, times passes per step. State: of the optimizer. "
    if found.run.device == "cpu":
        words += (
            "Process peak: of the whole process, with Python and libraries; the prediction counts tensors, which "
            "progtuning profile measures."
        )
    else:
        words += "Measured peak: of the allocator."
    return f"<table><tr>{head}</tr>{body}</table><p>{words}</p>"
