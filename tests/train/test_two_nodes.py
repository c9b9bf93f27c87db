"""Two nodes: two network namespaces of this machine, one rank in each, started as on a cluster without ssh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from progtuning_ds.train.records import RunRecord, StageRecord, StepRecord, read_records
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.0.1", "10.213.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that see each other, and nothing else, over a cable."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (iproute2)")
    names = (f"node0-{os.getpid()}", f"node1-{os.getpid()}")
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs network namespaces: {error.stderr.strip()}")
    try:
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(node: str, rank: int, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The launcher on one node, as docs/multinode.md has it; each node has its own home and temporary folder."""
    home = folder / f"home{rank}"
    home.mkdir()
    command = [
        *("ip", "netns", "exec", node, sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_ssh"),
        *("--hostfile", str(folder / "hostfile"), "--node_rank", str(rank)),
        *("--master_addr", ADDRESSES[0], "--master_port", "29511", str(ROOT / "launch" / "train.py"), *arguments),
    ]
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "cable",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(home / "datasets"),
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.mark.slow
def test_two_nodes_train_and_freeze_together(nodes: tuple[str, str], tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    tiny.write_csv(tmp_path / "train.csv", tiny.rows(40))
    tiny.write_csv(tmp_path / "test.csv", tiny.rows(11, seed=1))
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    settings = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train_file": str(tmp_path / "train.csv"), "validation_file": str(tmp_path / "test.csv")},
        "train": {"epochs": 2, "global_batch_size": 8, "learning_rate": 5e-3},
        "logging": {"progress": "off", "plot": False},
        "deepspeed": "zero3",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    processes = [start(node, rank, tmp_path, "--config", str(tmp_path / "run.yaml")) for rank, node in enumerate(nodes)]
    outputs = []
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    (run,) = read_records(tmp_path / "run", RunRecord)
    assert run.world_size == 2
    assert len(read_records(tmp_path / "run", StepRecord)) == run.total_steps == 10
    stages = read_records(tmp_path / "run", StageRecord)
    assert all(len(stage.state_bytes_per_rank) == 2 for stage in stages)
    assert stages[1].moved_bytes == 0
    assert sum(stages[1].state_bytes_per_rank) < sum(stages[0].state_bytes_per_rank)
