"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

# Ranks import test modules by name, and plain `pytest` in importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so nothing here may import it

from tests.ranks import RankPools, has_gpu_each

# What takes long and is near to something that stays: `pytest -m ""` runs it too.
SLOW = (
    # DeepSpeed compiles its fused Adam, which takes most of a minute.
    "tests/engine/*-fused*",
    "tests/engine/test_misuse.py*muon*",
    # Others of the same kind stay.
    "tests/checkpoint/test_resume.py::test_a_checkpoint_of_the_first*",
    "tests/checkpoint/test_resume.py::test_a_resumed_run_with_offload*",
    "tests/engine/test_checkpoints.py*offload*rotating*",
    "tests/engine/test_checkpoints.py*subgroups*",
    "tests/engine/test_checkpoints.py::test_a_checkpoint_resumes*zero3-bf16-planned*",
    "tests/engine/test_checkpoints.py::test_zero_to_fp32*zero2-*",
    "tests/engine/test_checkpoints.py::test_zero_to_fp32*zero3-fp32*",
    "tests/engine/test_frozen.py::test_frozen_weights*zero3-bf16-planned*",
    "tests/engine/test_frozen.py::test_frozen_weights*zero[01]-*planned*",
    "tests/engine/test_frozen.py::test_without*offload*",
    "tests/engine/test_frozen.py::test_without*zero2-fp32*",
    "tests/engine/test_frozen.py::test_without*zero3-[bs]*",
    "tests/engine/test_frozen.py::test_without*zero[01]*",
    "tests/engine/test_fused_step.py::test_options*zero3-subgroups*",
    "tests/engine/test_fused_step.py::test_stages*zero3-bf16-rotating*",
    "tests/engine/test_fused_step.py::test_stages*zero3-fp32-planned*",
    "tests/engine/test_fused_step.py::test_tritons*",
    "tests/engine/test_fused_step_bytes.py*",
    "tests/engine/test_memory.py*zero3-offload*",
    "tests/engine/test_memory.py::test_shares*offload*",
    "tests/engine/test_memory.py::test_shares*subgroups*",
    "tests/engine/test_methods.py*bitfit-zero3*",
    "tests/engine/test_misuse.py::test_a_set_smaller*",
    "tests/engine/test_parity.py::test_a_language*planned*",
    "tests/engine/test_parity.py::test_any_world_size*3-*rotating*",
    "tests/engine/test_parity.py::test_any_world_size*4-*",
    "tests/engine/test_parity.py::test_frozen_embeddings*never*",
    "tests/engine/test_parity.py::test_groups_that_were_not*growing*",
    "tests/engine/test_parity.py::test_groups_that_were_not*offload*",
    "tests/engine/test_parity.py::test_groups_that_were_not*zero3-bf16*",
    "tests/engine/test_parity.py::test_options_of_zero*rotating*",
    "tests/engine/test_parity.py::test_stages*zero3-offload-bf16*",
    "tests/engine/test_plain_deepspeed.py*offload-bf16*",
    "tests/engine/test_plain_deepspeed.py*zero3-bf16*",
    "tests/engine/test_plain_deepspeed.py*zero3-offload*",
    "tests/engine/test_process_memory.py*bf16*",
    "tests/engine/test_process_memory.py*zero3*",
    "tests/faults/test_disk.py*",
    "tests/tasks/test_causal.py::test_scores_of_a_run*",
    "tests/tasks/test_glue.py::test_a_run*stsb*",
    "tests/train/test_export.py*zero3*",
    "tests/train/test_launch.py::test_a_mistake_ends*",
    "tests/train/test_memory.py::test_a_larger*",
    "tests/train/test_memory.py::test_memory_that_runs_out*",
    "tests/train/test_on_freeze.py::test_either_export*",
    "tests/train/test_probe.py*zero3*",
    "tests/train/test_rates.py*cosine*",
    "tests/train/test_resume.py::test_a_damaged*",
    "tests/train/test_resume.py::test_a_run_goes_on_with_the_settings*",
    "tests/train/test_resume.py::test_a_signal*evaluation*",
    "tests/train/test_resume.py::test_records_of*",
    "tests/train/test_run.py::test_compare*",
    "tests/train/test_run.py::test_options_train_to_the_end*",
    "tests/train/test_run.py::test_the_exported*bf16*",
    "tests/train/test_run.py::test_the_exported*offload*",
    "tests/train/test_run.py::test_the_exported*zero1*",
    "tests/train/test_run.py::test_the_exported*zero3*",
    "tests/trainer/test_callback.py*ddp*",
    "tests/trainer/test_callback.py*zero3*",
    "tests/trainer/test_callback.py::test_a_second_run*",
    "tests/trainer/test_callback.py::test_embeddings_that_freeze*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and skip what needs a GPU where there is none."""
    for item in items:
        name = item.nodeid.replace("[", "-")  # brackets mean something in patterns
        if any(fnmatchcase(name, pattern) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
    if has_gpu_each(1):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(2).run(function, key=value)`` runs a top-level function on two live DeepSpeed ranks."""
    pools = RankPools()
    yield pools
    pools.close()
