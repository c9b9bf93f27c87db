"""The Trainer callback as users start it: DeepSpeed's launcher, torchrun, `accelerate launch` with a DeepSpeed JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train import tiny

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "trainer" / "script.py")
LAUNCHERS = {
    "deepspeed": ["deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--master_port"],
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--main_process_port"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


def configure_accelerate(folder: Path) -> Path:
    """What `accelerate config` writes where one says yes to DeepSpeed and to a JSON of its own."""
    json_file, path = folder / "ds.json", folder / "accelerate.yaml"
    content = {**dict.fromkeys(BATCH, "auto"), "gradient_clipping": "auto", "zero_optimization": {"stage": 2}}
    json_file.write_text(json.dumps(content))
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": str(json_file), "zero3_init_flag": False},
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def launch(kind: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[kind], port, *options, SCRIPT, *arguments],
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
    configuration = ("--config_file", str(configure_accelerate(tmp_path)))
    runs = (("deepspeed", "3"), ("torchrun", "2"), ("torchrun", "none"), ("accelerate", "accelerate"))
    for kind, zero in runs:
        output = tmp_path / zero
        options = configuration if kind == "accelerate" else ()
        done = launch(kind, str(tmp_path / "model"), str(output), zero, options=options)
        assert done.returncode == 0, done.stdout[-3000:]
        told[zero] = json.loads((output / "told.json").read_text())
    for one in told.values():
        assert one["stages"] == [1, 2]
        assert one["moved"] == [0, 0]
        assert one["losses"] == pytest.approx(told["none"]["losses"], abs=3e-5)
        assert one["eval_loss"] == pytest.approx(told["none"]["eval_loss"], abs=3e-5)
