"""Which implementation runs is decided before the first step and logged; nothing else falls back."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import types

import pytest
import torch
from progtuning_kernels import Control, FlatBuffer, Hyper, MaskedStep, Segment, choose, dispatch


def buffer(**changes: object) -> FlatBuffer:
    fields = {"exp_avg": torch.zeros(9), "exp_avg_sq": torch.zeros(9), "master": torch.zeros(9)}
    return FlatBuffer(segments=(Segment(0, 9, 0),), **(fields | changes))


def without_master() -> FlatBuffer:
    return buffer(master=None, weight=torch.zeros(9, dtype=torch.bfloat16))


def test_auto_takes_pytorchs_fused_kernel_on_the_cpu_where_it_has_the_variant():
    assert choose("auto", buffer()).name == "fused_cpu"
    assert choose("auto", without_master()).name == "reference"


def test_the_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="progtuning_kernels"):
        for _ in range(3):
            MaskedStep([buffer()], [Hyper()], impl="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "Masked AdamW step: implementation 'reference' on cpu tensors (impl='reference')"
    ]


def test_a_wrong_choice_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"impl must be one of auto, triton, .* got 'tritn'; did you mean 'triton'\?"):
        choose("tritn", buffer())
    with pytest.raises(ValueError, match='impl must not be "fused_cpu" but for fp32 masters'):
        choose("fused_cpu", without_master())


def test_triton_is_refused_where_it_is_missing_or_too_old(monkeypatch):
    for version, message in ((None, "Triton is not installed"), ("3.5.1", "Triton 3.5.1 is too old, 3.6 or newer")):
        dispatch.lacking_triton.cache_clear()
        module = None if version is None else types.SimpleNamespace(__version__=version, __spec__=object())
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "triton", module)
            patch.setattr(importlib.util, "find_spec", lambda name, found=module: found)
            with pytest.raises(ValueError, match=f'impl must not be "triton" here: {message}'):
                choose("triton", buffer())
    dispatch.lacking_triton.cache_clear()


def test_triton_is_refused_for_tensors_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "lacking_triton", lambda: None)
    with pytest.raises(ValueError, match='impl must not be "triton" for tensors on the CPU'):
        choose("triton", buffer())


def test_the_package_runs_without_importing_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from progtuning_kernels import *\n"
        "buffer = FlatBuffer((Segment(0, 9, 0),), torch.zeros(9), torch.zeros(9), master=torch.ones(9))\n"
        "for impl in ('auto', 'reference'):\n"
        "    step = MaskedStep([buffer], [Hyper()], impl=impl)\n"
        "    step.step([torch.ones(9)])\n"
        "assert (buffer.master < 1).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hyper(lr=-1), "lr must be at least 0, got -1"),
        (lambda: Hyper(betas=(0.9, 1.0)), r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        (lambda: Hyper(eps=-1), "eps must be at least 0, got -1"),
        (lambda: Hyper(weight_decay=-0.1), "weight_decay must be at least 0, got -0.1"),
        (lambda: Hyper(lr=float("nan")), "lr must be at least 0, got nan"),
        (lambda: Control([], "cpu"), "groups must name at least one group, got none"),
        (lambda: Control([Hyper()], "cpu", max_norm=-1), "max_norm must be at least 0"),
        (lambda: Control([Hyper()], "cpu").set_limits(loss_scale=0), "loss_scale must be positive, got 0.0"),
        (lambda: Control([Hyper()], "cpu").set_groups([]), "groups must have 1 entries, got 0"),
        (lambda: Control([Hyper()], "cpu").set_active([]), "active must have 1 entries, got 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
