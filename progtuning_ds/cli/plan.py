"""Owns `progtuning plan`: a model's skeleton and a schedule in, a report out. No deepspeed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import transformers
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from progtuning_ds.accounting import ComponentCounts, RunAccount, account
from progtuning_ds.blocks import component_counts, discover_blocks
from progtuning_ds.cli.skeleton import HEADS, build_skeleton, choose_head, load_config
from progtuning_ds.errors import ConfigError, require_choice
from progtuning_ds.memory import Workload
from progtuning_ds.model_shape import architecture, param_table
from progtuning_ds.schedule import EMBEDDINGS, StagePlan, plan_stages

_LENGTH_UNITS = ("epochs", "fractions")


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for, as written on the command line."""

    model: str
    epochs: str
    stages: int | None = None
    embeddings: str = "always"
    stage_lengths: str | None = None
    length_unit: str = "epochs"
    head: str | None = None
    num_labels: int | None = None
    blocks: str | None = None
    always_train: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What is printed: the model, its parameters by component, the plan and its account."""

    model: str
    architecture: str
    head: str
    blocks_path: str
    counts: ComponentCounts
    plan: StagePlan
    run: RunAccount
    workload: Workload
    model_type: str
    max_positions: int | None
    """Longest sequence the model can read, None where it sets no limit."""


def make_report(request: PlanRequest) -> PlanReport:
    """Check the request, build the model without weights, and account for the plan; `ConfigError` for bad input."""
    epochs = _positive("epochs", request.epochs)
    lengths = _lengths(request.stage_lengths)
    require_choice("embeddings", request.embeddings, EMBEDDINGS)
    require_choice("length_unit", request.length_unit, _LENGTH_UNITS)
    if request.head is not None:
        require_choice("head", request.head, HEADS)

    transformers.logging.set_verbosity_error()
    config = load_config(request.model)
    head = choose_head(config, request.head)
    model = build_skeleton(config, head, request.num_labels)
    blocks = discover_blocks(model, path=request.blocks)
    counts = component_counts(model, blocks, always_train=request.always_train)

    stages = request.stages if request.stages is not None else len(lengths) if lengths else math.ceil(epochs)
    steps_per_epoch = _virtual_steps_per_epoch(epochs, stages, lengths, request.length_unit)
    plan = plan_stages(
        len(blocks),
        stages,
        int(epochs * steps_per_epoch),
        request.embeddings,
        lengths=lengths,
        length_unit=request.length_unit,
        steps_per_epoch=steps_per_epoch,
        always_train=request.always_train,
    )
    return PlanReport(
        model=request.model,
        architecture=type(model).__name__,
        head=head,
        blocks_path=blocks.path,
        counts=counts,
        plan=plan,
        run=account(counts, plan, steps_per_epoch),
        workload=Workload(param_table(model, blocks), architecture(model, blocks), plan),
        model_type=config.get_text_config().model_type,
        max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


def print_json(report: PlanReport) -> None:
    """Print the report as JSON on stdout."""
    typer.echo(json.dumps(report_content(report), indent=2))


def report_content(report: PlanReport) -> dict[str, Any]:
    """What the JSON says."""
    plan, run = report.plan, report.run
    stages = _stages_content(plan, run)
    return {
        "model": report.model,
        "architecture": report.architecture,
        "head": report.head,
        "blocks_path": report.blocks_path,
        "num_blocks": plan.num_blocks,
        "components": {
            "embeddings": report.counts.embeddings,
            "blocks": list(report.counts.blocks),
            "head": report.counts.head,
        },
        "parts": [list(part.blocks) for part in plan.parts],
        "stages": stages,
        "updated_params": run.updated_params,
        "updated_params_full": run.updated_params_full,
        "saving": run.saving,
    }


def _stages_content(plan: StagePlan, run: RunAccount) -> list[dict[str, Any]]:
    return [
        {
            "index": stage.index,
            "trainable_blocks": list(stage.trainable_blocks),
            "embeddings": stage.embeddings,
            "trainable_params": cost.trainable_params,
            "epochs": _number(cost.epochs),
            "updated_params": _number(cost.updated_params),
        }
        for stage, cost in zip(plan.stages, run.stages, strict=True)
    ]


def print_table(report: PlanReport) -> None:
    """Print the report as a table for people; blocks count from 0, stages from 1."""
    plan, run, total = report.plan, report.run, report.counts.total
    table = Table(
        title=f"{report.architecture}: {plan.num_blocks} blocks ({report.blocks_path}), {total:,} parameters",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("Stage", no_wrap=True)
    for column in ("Blocks", "Embeddings", "Parameters", "Share", "Epochs", "Updated"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, cost in zip(plan.stages, run.stages, strict=True):
        table.add_row(
            f"{stage.index + 1}/{len(plan.stages)}",
            _ranges(stage.trainable_blocks),
            "train" if stage.embeddings else "frozen",
            f"{cost.trainable_params:,}",
            f"{cost.trainable_params / total:.1%}" if total else "",
            f"{float(cost.epochs):g}",
            f"{round(cost.updated_params):,}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"The head trains in every stage. Updated over the run: {run.updated_params:,} parameters "
        f"instead of {run.updated_params_full:,}, which saves [bold]{run.saving:.1%}[/bold]."
    )
    if plan.always_train:
        console.print(f"Trains in every stage: {', '.join(plan.always_train)}", markup=False)


def _ranges(blocks: tuple[int, ...]) -> str:
    """Write sorted block indices as `0-3, 7`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def _virtual_steps_per_epoch(epochs: Fraction, stages: int, lengths: list[Fraction] | None, length_unit: str) -> int:
    """Return the smallest number of steps per epoch at which the run and every stage end on a whole step.

    There is no data yet, so the number of steps is free, and the account stays exact.
    """
    if lengths is None:
        exact: Iterable[Fraction] = [epochs / max(stages, 1)]
    elif length_unit == "fractions":
        exact = [epochs * length / sum(lengths) for length in lengths]
    else:
        exact = lengths
    return math.lcm(epochs.denominator, *(length.denominator for length in exact))


def _lengths(text: str | None) -> list[Fraction] | None:
    if text is None:
        return None
    return [_positive(f"stage_lengths[{index}]", item) for index, item in enumerate(text.split(","))]


def _positive(field: str, text: str) -> Fraction:
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0:
        raise ConfigError(f"{field} must be a positive number, got {text!r}")
    return value


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
