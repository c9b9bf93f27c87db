"""The Trainer callback as a user starts it: DeepSpeed's launcher, torchrun. (Accelerate starts CPU ranks by MPI.)"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "trainer" / "script.py")
LAUNCHERS = {
    "deepspeed": ["deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--master_port"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


def launch(kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[kind], port, SCRIPT, *arguments],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out)


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_all_launchers_train_the_same(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model", layers=3)
    told = {}
    for kind, zero in (("deepspeed", "3"), ("torchrun", "2"), ("torchrun", "none")):
        output = tmp_path / zero
        done = launch(kind, str(tmp_path / "model"), str(output), zero)
        assert done.returncode == 0, done.stdout[-3000:]
        told[zero] = json.loads((output / "told.json").read_text())
    for one in told.values():
        assert one["stages"] == [1, 2]
        assert one["moved"] == [0, 0]
        assert one["losses"] == pytest.approx(told["none"]["losses"], abs=3e-5)
        assert one["eval_loss"] == pytest.approx(told["none"]["eval_loss"], abs=3e-5)
