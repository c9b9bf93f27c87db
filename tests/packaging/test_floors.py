"""The rules about who may import what are checks that bite, not comments."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ruff_accepts(code: str, filename: str) -> bool:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", filename, "-"]
    result = subprocess.run(command, cwd=ROOT, input=code, text=True, capture_output=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    return result.returncode == 0


@pytest.mark.parametrize(
    "code",
    [
        "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3\n",
        "import deepspeed.runtime.engine\n",
        "import deepspeed\n\nprint(deepspeed.runtime.config)\n",
    ],
)
def test_deepspeed_internals_are_open_to_the_zero_package_only(code):
    assert not ruff_accepts(code, "progtuning_ds/engine.py")
    assert not ruff_accepts(code, "launch/train.py")
    assert ruff_accepts(code, "progtuning_ds/zero/stage3.py")


def test_no_launch_script_has_the_name_of_another_module():
    """A script's folder leads `sys.path`, so such a file would be imported in the other's place."""
    stems = {path.stem for path in (ROOT / "launch").glob("*.py")}
    clashes = {stem for stem in stems if stem in sys.stdlib_module_names or importlib.util.find_spec(stem)}
    assert "train" in stems
    assert not clashes
