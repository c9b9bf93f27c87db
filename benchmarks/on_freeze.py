"""What quantizing frozen blocks gives back and costs, on the embedded default model and data.

    python benchmarks/on_freeze.py                                          # keep, int8, nf4; 3 seeds; an hour on a CPU
    python benchmarks/on_freeze.py --seeds 0 -- data.max_train_samples=600

Each run is `launch/demo.sh` with another `schedule.on_freeze`; what follows `--` goes to all of them. Prints, per way,
the score of the model as it was trained and of its two exports (frozen blocks dequantized, or exact as they froze),
mean and standard deviation over seeds, and what a rank holds of the weights in the last stage. Writes JSON with
--output. Runs that are already there are not repeated.
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

KINDS = ("keep", "int8", "nf4")


def run(on_freeze: str, seed: int, folder: Path, extra: list[str]) -> dict[str, Any]:
    """One training run, or what an earlier one left."""
    settings = {"schedule.on_freeze": on_freeze, "train.seed": seed}
    return demo_run(folder / f"{on_freeze}-{seed}", settings, extra)


def row(on_freeze: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the seeds of one setting."""
    main = runs[0]["summary"]["main_metric"]
    split = next(iter(runs[0]["summary"]["metrics"]))
    scores = {"trained": [r["summary"]["metrics"][split][main] for r in runs]}
    for kind in runs[0]["summary"]["frozen_metrics"]:
        scores[kind] = [r["summary"]["frozen_metrics"][kind][split][main] for r in runs]
    last = runs[0]["stages"][-1]["memory"]
    return {
        "on_freeze": on_freeze,
        "seeds": len(runs),
        "metric": f"{split} {main}",
        "scores": {
            kind: {
                "mean": statistics.mean(own),
                "deviation": statistics.stdev(own) if len(own) > 1 else 0.0,
                "all": own,
            }
            for kind, own in scores.items()
        },
        "weights_bytes_last_stage": last["weights"],
        "quantized_bytes_last_stage": last.get("quantized_weights", 0),
        "transition_seconds": [stage["transition_seconds"] for stage in runs[0]["stages"][1:]],
        "seconds_last_stage": statistics.median(r["stages"][-1]["seconds"] for r in runs),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "on_freeze", "as trained", "dequantized export", "exact export", "weights a rank, last stage", "seconds"
    )
    for r in rows:
        scores = [r["scores"].get(kind) for kind in ("trained", "dequantized", "exact")]
        held = r["weights_bytes_last_stage"] + r["quantized_bytes_last_stage"]
        table.add_row(
            r["on_freeze"],
            *("" if score is None else f"{score['mean']:.4f} ± {score['deviation']:.4f}" for score in scores),
            f"{held / 2**20:.1f} MiB ({r['quantized_bytes_last_stage'] / 2**20:.1f} quantized)",
            f"{r['seconds_last_stage']:.0f}",
        )
    console = Console(width=140)
    console.print(rows[0]["metric"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/on_freeze"))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("extra", nargs="*", help="settings for every run, after --")
    options = parser.parse_args()
    rows = []
    for kind in options.kinds:
        runs = [run(kind, seed, options.folder.resolve(), options.extra) for seed in options.seeds]
        rows.append(row(kind, runs))
        show(rows)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
