"""Every method with and without Progtuning, several seeds each, on the embedded default model and data.

    python benchmarks/methods.py                                  # full, LoRA, adapter, BitFit; 3 seeds; hours on a CPU
    python benchmarks/methods.py --methods lora --seeds 0 -- data.max_train_samples=500

Each run is `launch/demo.sh` with other settings; what follows `--` goes to all of them. Prints a table of accuracy
(mean and standard deviation over seeds), updated parameters, optimizer state in the last stage and seconds of training
(median over seeds; evaluations and start-up left out), and writes JSON with --output. All methods run in turns, seed by
seed. Runs that are already there are not repeated, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from demo_runs import demo_run
from rich.console import Console
from rich.table import Table

# Additions start from nothing and want larger steps than weights that are already good.
LEARNING_RATES = {"full": 1e-4, "lora": 3e-3, "dora": 3e-3, "adapter": 1e-3, "bitfit": 3e-3, "ia3": 3e-3}


def run(method: str, staged: bool, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One training run, or what an earlier one left."""
    output = folder / f"{method}-{'progtuning' if staged else 'constant'}-{seed}"
    settings = {
        "method.kind": method,
        "schedule.enabled": str(staged).lower(),
        "train.seed": seed,
        "train.learning_rate": LEARNING_RATES.get(method, 1e-3),
    }
    return demo_run(output, settings, extra)


def row(method: str, staged: bool, runs: list[dict[str, Any]], extra: list[str]) -> dict[str, Any]:
    """Sum up the seeds of one setting."""
    main = runs[0]["summary"]["main_metric"]
    scores = [next(iter(r["summary"]["metrics"].values()))[main] for r in runs]
    last = runs[0]["stages"][-1]
    return {
        "method": method,
        "progtuning": staged,
        "learning_rate": LEARNING_RATES.get(method, 1e-3),
        "settings": extra,
        "seeds": len(runs),
        "metric": main,
        "scores": scores,
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "updated_params": runs[0]["summary"]["updated_params"],
        "state_bytes_last_stage": max(last["state_bytes_per_rank"]),
        "training_seconds": statistics.median(sum(stage["seconds"] for stage in r["stages"]) for r in runs),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "Progtuning", rows[0]["metric"], "updated parameters", "state, last stage", "training")
    for r in rows:
        table.add_row(
            r["method"],
            "yes" if r["progtuning"] else "no",
            f"{r['mean']:.4f} ± {r['deviation']:.4f}",
            f"{r['updated_params']:,}",
            f"{r['state_bytes_last_stage'] / 2**20:.2f} MiB a rank",
            f"{r['training_seconds']:.1f} s",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "adapter", "bitfit"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("extra", nargs="*", help="settings for every run, after --")
    options = parser.parse_args()
    settings = [(method, staged) for method in options.methods for staged in (False, True)]
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {setting: [] for setting in settings}
    for seed in options.seeds:
        for setting in settings:
            runs[setting].append(run(*setting, seed, options.folder.resolve(), options.extra))
        rows = [row(*setting, runs[setting], options.extra) for setting in settings]
        show(rows)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
