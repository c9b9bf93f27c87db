"""The program as a user starts it: DeepSpeed's launcher, two ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from progtuning_ds.train.records import RunRecord, StepRecord, read_records
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Start two ranks on the CPU; ends them all if they take too long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_gpus",
        "2",
        "--master_port",
        str(port),
    ]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A session of its own: the launcher's ranks must not outlive a timeout.
    process = subprocess.Popen(
        [*runner, *arguments],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model", dropout=0.1)
    tiny.write_csv(tmp_path / "train.csv", tiny.rows(250))
    tiny.write_csv(tmp_path / "test.csv", tiny.rows(61, seed=1))
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(tmp_path / "model")},
                "data": {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "test.csv")},
                "train": {"epochs": 4, "global_batch_size": 16, "learning_rate": 1e-2, "warmup_ratio": 0.2},
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    return path


def test_two_launched_ranks_learn_and_tell(config: Path, tmp_path: Path) -> None:
    done = launch("launch/train.py", "--config", str(config), "train.seed=1", "schedule.num_stages=2")
    assert done.returncode == 0, done.stderr
    (run,) = read_records(tmp_path / "run", RunRecord)
    assert run.world_size == 2
    assert run.metrics["validation"]["accuracy"] > 0.8, "one word in each row gives its label away"
    assert len(read_records(tmp_path / "run", StepRecord)) == run.total_steps == 64
    for words in ("stage 1/2", "stage 2/2", "step 64/64", "trainable params", "updated parameters", "accuracy"):
        assert words in done.stdout
    assert done.stdout.count("step 10/64") == 1, "only one rank speaks"


def test_a_mistake_ends_every_rank_with_one_line_and_code_2(config: Path, tmp_path: Path) -> None:
    done = launch("--module", "progtuning_ds.train", "--config", str(config), "task.text_column=texts")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "task.text_column must be one of text, label" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
