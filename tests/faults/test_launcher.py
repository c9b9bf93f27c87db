"""SIGTERM through DeepSpeed's own launcher, as a batch system sends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.train.records import StepRecord, read_records
from tests.faults.conftest import Bench
from tests.train.test_launch import ROOT, launch
from tests.train.test_resume import same_results


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_the_whole_job_saves_and_the_same_command_goes_on(bench: Bench, tmp_path: Path) -> None:
    arguments = ["launch/train.py", *bench.arguments(tmp_path / "run", "zero2", "--resume", "auto")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*runner, "--master_port", str(port), *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 270
        while not read_records(tmp_path / "run", StepRecord) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_records(tmp_path / "run", StepRecord), "it has begun to train"
        os.killpg(process.pid, signal.SIGTERM)
        while _alive(process.pid) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
        assert not _alive(process.pid), "the job ends by itself"
    finally:
        if _alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    done = len(read_records(tmp_path / "run", StepRecord))
    assert 0 < done < 10, "it was stopped on the way"
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps()[0] == done
    again = launch(*arguments)
    assert again.returncode == 0, again.stderr
    same_results(tmp_path / "run", bench.whole("zero2").folder)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
