"""Tables at the end of a run, drawn from its records. No torch, no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from progtuning_ds.train.progress import human_bytes
from progtuning_ds.train.records import RunRecord, StageRecord


def print_summary(console: Console, run: RunRecord, stages: Sequence[StageRecord]) -> None:
    """Print what each stage trained, held, took and reached, and what the run saved."""
    table = Table(title=f"{run.kind}: {len(stages)} stage(s), {run.total_steps} steps", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for name in ("trainable params", "optimizer state per rank", "samples/s", "seconds", run.main_metric):
        table.add_column(name, justify="right")
    for stage in stages:
        table.add_row(
            f"{stage.stage + 1}/{len(stages)}",
            f"{stage.trainable_params:,}",
            _bytes(stage.state_bytes_per_rank),
            f"{stage.samples_per_second:.1f}",
            f"{stage.seconds:.1f}",
            f"{stage.metrics[run.main_metric]:.4f}",
        )
    console.print(table)
    console.print(
        f"updated parameters {run.updated_params:,} of {run.updated_params_full:,} without freezing: "
        f"{run.saving:.1%} saved",
        highlight=False,
    )
    kinds = {f", frozen blocks {kind}": splits for kind, splits in run.frozen_metrics.items()}
    for kind, splits in {"": run.metrics, **kinds}.items():
        for split, metrics in splits.items():
            scores = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            console.print(f"{split}{kind}: {scores}", highlight=False)


def print_comparison(console: Console, runs: Sequence[RunRecord], stages: Sequence[Sequence[StageRecord]]) -> None:
    """Print several runs side by side, one column each."""
    table = Table(title="side by side", box=box.SIMPLE_HEAD)
    table.add_column("")
    for run in runs:
        table.add_column(run.kind, justify="right")
    rows = {
        "updated params": [f"{run.updated_params:,}" for run in runs],
        "state per rank, first stage": [_bytes(own[0].state_bytes_per_rank) for own in stages],
        "state per rank, last stage": [_bytes(own[-1].state_bytes_per_rank) for own in stages],
        "training seconds": [f"{sum(stage.seconds for stage in own):.1f}" for own in stages],
        "samples/s, last stage": [f"{own[-1].samples_per_second:.1f}" for own in stages],
    }
    for split in runs[0].metrics:
        for name in runs[0].metrics[split]:
            rows[f"{split} {name}"] = [f"{run.metrics[split][name]:.4f}" for run in runs]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def _bytes(per_rank: Sequence[int]) -> str:
    """The largest share; shares are equal up to alignment."""
    return human_bytes(max(per_rank))
