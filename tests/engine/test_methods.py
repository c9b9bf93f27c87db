"""Parameter-efficient methods through the stage engine train what a single process trains, and nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.engine.agreement import assert_agree, oracle, tolerance_for
from tests.engine.conftest import StagedRuns
from tests.engine.flavours import ALL
from tests.engine.ranks_train import MODES
from tests.ranks import has_gpu_each

DEFAULT = [
    ("bert+lora", "zero2-fp32", "planned"),
    ("bert+lora", "zero3-fp32", "rotating"),
    ("bert+adapter", "zero2-bf16", "planned"),
    ("bert+adapter", "zero3-fp32", "planned"),
    ("bert+bitfit", "zero2-fp32", "rotating"),
    ("bert+bitfit", "zero3-fp32", "planned"),
    ("bert+ia3", "zero2-fp32", "planned"),
    ("bert+qlora", "zero2-fp32", "planned"),
    ("llama+qlora", "zero3-fp32", "planned"),
]
MODES_OF_MORE = ("planned", "rotating")
MORE = [
    *(
        (f"bert+{method}", flavour, mode)
        for method in ("lora", "dora", "rslora", "layernorm")
        for flavour in ("zero1-fp32", "zero2-bf16", "zero3-fp32")
        for mode in MODES_OF_MORE
        if (f"bert+{method}", flavour, mode) not in DEFAULT
    ),
    *(("llama+lora", flavour, mode) for flavour in ("zero1-fp32", "zero3-fp32") for mode in MODES_OF_MORE),
    ("llama+qlora", "zero2-bf16", "planned"),
    ("llama+qlora", "zero2-fp32", "rotating"),
    ("bert+qlora", "zero3-fp32", "rotating"),
    ("bert+qlora", "zero1-fp32", "planned"),
]


@pytest.mark.parametrize(
    ("kind", "name", "mode"), [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_a_method_trains_as_the_oracle_and_leaves_the_base_alone(
    staged_runs: StagedRuns, kind: str, name: str, mode: str
) -> None:
    runs = staged_runs(name, mode, kind=kind)
    numerics = ALL[name].numerics
    phases, _ = MODES[mode]
    device = "cuda" if has_gpu_each(2) else "cpu"
    expected = oracle(kind, phases, 2, numerics, device)
    assert_agree(runs, expected, tolerance_for(numerics))
    moved = {
        parameter
        for before, after in zip(expected.weights, expected.weights[1:], strict=False)
        for parameter in after
        if not torch.equal(before[parameter], after[parameter])
    }
    assert moved, "the method trains something after the first phase"
    for run in runs:
        for parameter in run.weights[0].keys() - moved:
            for phase in run.weights[1:]:
                assert torch.equal(phase[parameter], run.weights[0][parameter]), parameter
    frozen_now = [b.transition.frozen for b in runs[0].boundaries]
    assert all(frozen_now) or mode == "rotating"
    marks = {"lora": "lora_", "qlora": "lora_", "ia3": "ia3_", "adapter": "adapter_", "bitfit": "bias"}
    mark = marks.get(kind.split("+")[1])
    if mark:
        assert all(mark in parameter for names in frozen_now for parameter in names if ".layer." in parameter)
