"""Owns `progtuning probe`: what each block contributes. Starts DeepSpeed inside the command only."""

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

from progtuning_ds.config import load_run_config
from progtuning_ds.errors import ConfigError


def probe(
    config: str, overrides: Sequence[str], *, steps: int | None, fast: bool, as_json: bool, output: Path | None
) -> None:
    """Probe every block and print, write and draw what was found; every rank calls it, the first one speaks.

    Raises:
        ConfigError: as training would, and for a number of steps below one.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be a positive whole number, got {steps}")
    run = load_run_config(config, overrides)
    from progtuning_ds.train.quiet import quiet_libraries

    quiet_libraries(run.logging)
    from progtuning_ds.train.probing import draw_probe, run_probe
    from progtuning_ds.train.ranks import leave_ranks

    is_first = int(os.environ.get("RANK", "0")) == 0
    speaks = is_first and not as_json
    try:
        found = run_probe(run, steps=steps, fast=fast, tell=typer.echo if speaks else lambda line: None)
    finally:
        leave_ranks()
    if not is_first:
        return
    content = dataclasses.asdict(found)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "probe.json").write_text(json.dumps(content, indent=2) + "\n")
        draw_probe(found, output / "probe.png")
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        print_probe(found)


def print_probe(found: Any) -> None:
    """Print a row per block, with a bar as long as its contribution."""
    table = Table(title=f"{found.measure}, {found.steps} steps", box=box.SIMPLE_HEAD)
    table.add_column("block", justify="right")
    table.add_column("contribution", justify="right")
    table.add_column("")
    longest = max((abs(one.contribution) for one in found.blocks), default=0.0) or 1.0
    for one in found.blocks:
        if one.block is not None:
            bar = "█" * round(30 * max(one.contribution, 0.0) / longest)
            table.add_row(str(one.block), f"{one.contribution:+.4f}", bar)
    Console().print(table)
