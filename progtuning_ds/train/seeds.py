"""The same run with several seeds: what they reach on average, and how far they spread. No deepspeed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from progtuning_ds.config import RunConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.train.outcome import GuardStopError

SEEDS = "seeds.json"


@dataclass(frozen=True, slots=True)
class SeedResult:
    """The last scores of one seed by split, or why it has none."""

    seed: int
    metrics: Mapping[str, Mapping[str, float]]
    diverged: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """One score over the seeds that did not diverge; the deviation is the sample's, 0 for a single seed."""

    mean: float
    deviation: float
    lowest: float
    highest: float


def parse_seeds(text: str) -> list[int]:
    """Read `0,1,2`.

    Raises:
        ConfigError: if it is no list of different whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(map(int, parts))) != len(parts):
        raise ConfigError(f"--seeds must be different whole numbers such as 0,1,2, got {text!r}")
    return [int(part) for part in parts]


def seed_configs(config: RunConfig, seeds: Sequence[int]) -> list[RunConfig]:
    """One configuration per seed, each with a run directory of its own within that of the run."""
    return [
        dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, seed=seed),
            output_dir=str(Path(config.output_dir) / f"seed-{seed}"),
        )
        for seed in seeds
    ]


def run_seeds(
    configs: Sequence[RunConfig], train: Callable[[RunConfig], Mapping[str, Mapping[str, float]]]
) -> list[SeedResult]:
    """Train each configuration; a run that its guard ends is told as diverged, and the next one begins.

    Args:
        configs: what `seed_configs` returned.
        train: trains one and returns its last scores by split. Collective.
    """
    results = []
    for config in configs:
        seed = config.train.seed
        try:
            results.append(SeedResult(seed, train(config)))
        except GuardStopError as error:
            results.append(SeedResult(seed, {}, str(error)))
    return results


def spreads(results: Sequence[SeedResult]) -> dict[str, dict[str, Spread]]:
    """Mean and spread of every score of every split over the seeds that did not diverge."""
    good = [result.metrics for result in results if result.diverged is None]
    if not good:
        return {}
    return {
        split: {name: _spread([metrics[split][name] for metrics in good]) for name in scores}
        for split, scores in good[0].items()
    }


def write_seeds(folder: Path, results: Sequence[SeedResult]) -> Path:
    """Write results and spreads as JSON."""
    content = {
        "seeds": [dataclasses.asdict(result) for result in results],
        "spread": {
            split: {name: dataclasses.asdict(one) for name, one in scores.items()}
            for split, scores in spreads(results).items()
        },
    }
    path = folder / SEEDS
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def print_seeds(console: Console, results: Sequence[SeedResult]) -> None:
    """Print mean, deviation and range of every score, and the seeds that diverged."""
    good = sum(result.diverged is None for result in results)
    table = Table(title=f"{good} of {len(results)} seeds", box=box.SIMPLE_HEAD)
    table.add_column("score")
    for name in ("mean", "deviation", "lowest", "highest"):
        table.add_column(name, justify="right")
    for split, scores in spreads(results).items():
        for name, one in scores.items():
            values = (one.mean, one.deviation, one.lowest, one.highest)
            table.add_row(f"{split} {name}", *(f"{value:.4f}" for value in values))
    console.print(table)
    for result in results:
        if result.diverged is not None:
            console.print(f"seed {result.seed} diverged: {result.diverged}", highlight=False, markup=False)


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, min(values), max(values))
