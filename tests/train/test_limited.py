"""What the planner proposes runs under a limit that the kernel enforces, and what it rejects does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_profile import sources  # noqa: F401 - the same model and rows
from tests.train.test_run import settings

MIB = 2**20
SLACK = 96 * MIB  # heap, thread stacks and oneDNN's scratch, which are no tensors
ROWS, SEQ_LEN = 32, 128
PLENTY = 100_000


def propose(given: dict[str, Any], megabytes: int) -> dict[str, Any] | None:
    """Settings of the cheapest run that fits so much for tensors, or None; runs in a process of its own."""
    from progtuning_ds.config import Hardware, run_config
    from progtuning_ds.memory import Budget, Request, deepspeed_zero, search
    from progtuning_ds.train.job import prepare_job

    job = prepare_job(run_config(given), Hardware(1))
    # The host's memory is the device's here: nothing may be proposed for it.
    budget = Budget(megabytes * MIB, host=1)
    request = Request(1, budget, SEQ_LEN, ROWS, "fp32", "eager", "cpu")
    proposal = search(job.workload, request).proposal
    if proposal is None:
        return None
    sizes = [stage.micro_batch for stage in proposal.stages]
    return {
        "deepspeed": {"zero_optimization": deepspeed_zero(proposal.setup)},
        "model": {"gradient_checkpointing": proposal.choice.checkpointing},
        "memory": {"micro_batch_sizes": sizes},
        "train": {"micro_batch_size": sizes[0]},
        "predicted": max(stage.footprint.peak for stage in proposal.stages),
    }


def run_limited(given: dict[str, Any], megabytes: int) -> list[int]:
    """Peaks of all stages, with so much for tensors beyond what the process has before any weight is loaded."""
    import resource

    from progtuning_ds.config import run_config
    from progtuning_ds.train import profiling
    from progtuning_ds.train.quiet import quiet_libraries

    build = profiling.build

    def limit_and_build(*arguments: Any) -> Any:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = 1024 * int(status["VmData"].split()[0]) + megabytes * MIB + SLACK
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return build(*arguments)

    profiling.build = limit_and_build
    config = run_config({name: section for name, section in given.items() if name != "predicted"})
    quiet_libraries(config.logging)
    return [record.measured_peak for record in profiling.run_profile(config, steps=1).records]


def alone(function: str, given: dict[str, Any], megabytes: int) -> Any:
    """Run one of the functions above in a fresh process; its error text if it fails."""
    code = (
        "import json, sys\nfrom tests.train import test_limited\n"
        f"print('RESULT', json.dumps(test_limited.{function}(json.loads(sys.argv[1]), {megabytes})))"
    )
    root = str(Path(__file__).resolve().parents[2])
    environ = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**17),
        "PYTHONPATH": root,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environ,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that the kernel enforces")
@pytest.mark.parametrize("megabytes", [190, 260, 500])
def test_a_proposal_runs_under_the_limit_it_was_made_for(
    sources: Path,  # noqa: F811
    tmp_path: Path,
    megabytes: int,
) -> None:
    base = settings(
        sources,
        tmp_path / "run",
        model={"attn_implementation": "eager"},
        task={"max_length": SEQ_LEN},
        train={"epochs": 2, "global_batch_size": ROWS, "micro_batch_size": 1, "precision": "fp32"},
    )
    given = with_proposal(base, alone("propose", base, megabytes))
    peaks = alone("run_limited", given, megabytes)
    assert isinstance(peaks, list), peaks
    assert max(peaks) <= 1.05 * megabytes * MIB
    # The limit is one: what is cheaper, and was rejected for what it needs, fails under it.
    rejected = with_proposal(base, alone("propose", base, PLENTY))
    if rejected["predicted"] > (megabytes * MIB + SLACK) * 1.1:
        failed = alone("run_limited", rejected, megabytes)
        assert isinstance(failed, str)
        assert "memory" in failed
    else:
        assert megabytes > 260, "only where nearly everything fits"


def with_proposal(base: dict[str, Any], found: Any) -> dict[str, Any]:
    """The settings with what was proposed for them."""
    assert isinstance(found, dict), found
    given = {name: {**base.get(name, {}), **found[name]} for name in ("model", "memory", "train")}
    return {**base, **given, "deepspeed": found["deepspeed"], "predicted": found["predicted"]}
