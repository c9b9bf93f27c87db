"""Owns `progtuning profile`: predicted beside measured, stage by stage. Starts DeepSpeed inside the command only."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from progtuning_ds.cli.fit_show import GROUPS
from progtuning_ds.config import load_run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import format_bytes


def profile(
    config: str, overrides: Sequence[str], *, steps: int, as_json: bool, output: Path | None, snapshot: bool
) -> None:
    """Run some steps of every stage and print what they held; every rank calls it, the first one speaks.

    Raises:
        ConfigError: as training would, and for a number of steps below one.
    """
    if steps < 1:
        raise ConfigError(f"steps must be a positive whole number, got {steps}")
    if snapshot and output is None:
        raise ConfigError("--snapshot needs --output, the folder to write to")
    run = load_run_config(config, overrides)
    from progtuning_ds.train.quiet import quiet_libraries

    quiet_libraries(run.logging)
    from progtuning_ds.train.profiling import run_profile
    from progtuning_ds.train.ranks import leave_ranks

    snapshots = output if snapshot or run.memory.snapshot else None
    try:
        found = run_profile(run, steps=steps, snapshots=snapshots)
    finally:
        leave_ranks()
    if int(os.environ.get("RANK", "0")):
        return
    content = profile_content(found)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "profile.json").write_text(json.dumps(content, indent=2) + "\n")
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        print_profile(found)


def profile_content(found: Any) -> dict[str, Any]:
    """The JSON of a profile; bytes and seconds."""
    job = found.job
    return {
        "model": job.config.model.path,
        "zero_stage": job.zero_stage,
        "world_size": job.settings.world_size,
        "precision": job.settings.precision,
        "stages": [
            dataclasses.asdict(record) | {"deviation": record.deviation, "seconds": seconds}
            for record, seconds in zip(found.records, found.seconds, strict=True)
        ],
    }


def print_profile(found: Any) -> None:
    """Print two rows per stage, predicted and measured, for the first rank."""
    job = found.job
    console = Console(highlight=False)
    console.print(
        f"{job.shape.model_type} in {job.settings.precision}, ZeRO-{job.zero_stage} on {job.settings.world_size} "
        "rank(s); rank 0"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in ("Stage", "Rows", "Tokens", "", "Weights", "Optim.", "Peak", "Diff.", "Host"):
        table.add_column(column, justify="left" if column in ("Stage", "") else "right", no_wrap=True)
    count = len(found.records)
    for record in found.records:
        rows = f"{record.micro_batch} x {record.accumulation}"
        host_predicted = sum(record.predicted_host.values())
        predicted = record.predicted | {
            name: record.predicted.get(name, 0) + size for name, size in record.predicted_host.items()
        }
        table.add_row(
            f"{record.stage + 1}/{count}",
            rows,
            str(record.seq_len),
            "predicted",
            *_cells(predicted, record.predicted_peak),
            "",
            format_bytes(host_predicted) if host_predicted else "-",
        )
        table.add_row(
            "",
            "",
            "",
            "measured",
            *_cells(record.measured, record.measured_peak),
            f"{record.deviation:+.1%}",
            format_bytes(record.host),
        )
    console.print(table)
    console.print(
        "Weights and optimizer state: all of them, wherever they lie. Peak: of tensors, on the accelerator where there "
        "is one. Host: predicted for offload; measured, of the whole process."
    )


def _cells(held: dict[str, int], peak: int) -> tuple[str, str, str]:
    weights, optimizer = (sum(held.get(name, 0) for name in GROUPS[column]) for column in ("Weights", "Optim."))
    return format_bytes(weights), format_bytes(optimizer), format_bytes(peak)
