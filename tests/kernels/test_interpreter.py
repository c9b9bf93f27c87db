"""The Triton kernels, run by Triton's interpreter, pass every test of the step's semantics.

Triton decides when it is imported whether kernels are compiled or interpreted, so this needs a process of its own.
By hand: ``TRITON_INTERPRET=1 pytest tests/kernels/semantics``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1200)  # a whole suite of its own, interpreted
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels already")
def test_interpreted_kernels_pass_the_tests_of_the_semantics():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/semantics"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout[-2000:]
    assert int(passed.group(1)) >= 50  # all were collected for the interpreter, and none was skipped for want of it
