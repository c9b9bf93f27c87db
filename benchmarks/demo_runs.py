"""Runs of the embedded default model and data with other settings, for benchmarks that compare them over seeds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def demo_run(output: Path, settings: Mapping[str, Any], extra: list[str]) -> dict[str, Any]:
    """Summary and stages of `launch/demo.sh` with ``settings``; a run that is in ``output`` already is not repeated."""
    if not (output / "summary.json").exists():
        words = [f"{key}={value}" for key, value in {**settings, "output_dir": output}.items()]
        subprocess.run(["bash", "launch/demo.sh", "--overwrite", *words, *extra], check=True, cwd=REPOSITORY)
    summary = json.loads((output / "summary.json").read_text())
    stages = [json.loads(line) for line in (output / "stages.jsonl").read_text().splitlines()]
    return {"summary": summary, "stages": stages}
