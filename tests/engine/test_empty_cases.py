"""Tensors smaller than the group of ranks, ranks and stages with nothing to train, and weights that are tied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.agreement import assert_agree, oracle, tolerance_for
from tests.engine.conftest import StagedRuns
from tests.engine.flavours import ALL
from tests.engine.problem import build_model, shrinking
from tests.engine.ranks_train import MODES, build_staged, optimizer_step
from tests.ranks import RankPools, has_gpu_each

DEFAULT = [("narrow+rank1", "zero3-fp32", "planned", 2)]
MORE = [
    ("gpt2", "zero1-fp32", "planned", 2),
    *(("narrow+rank1", f"zero{stage}-fp32", mode, 4) for stage in (1, 2, 3) for mode in ("planned", "rotating")),
    ("narrow+rank1", "zero2-bf16", "planned", 4),
    ("narrow+rank1", "bf16-optimizer", "rotating", 4),
    ("narrow+rank1", "zero2-offload-fp32", "rotating", 4),
    ("narrow", "zero3-fp32", "rotating", 4),
    *(("bert+low", f"zero{stage}-fp32", mode, 2) for stage in (1, 2, 3) for mode in ("planned", "rotating")),
    *(("gpt2", f"zero{stage}-fp32", mode, 2) for stage in (2, 3) for mode in ("planned", "rotating")),
    *(("gpt2", "zero3-fp32", mode, 2) for mode in ("embeddings-first", "embeddings-never")),
    *(("gpt2+tied", f"zero{stage}-fp32", mode, 2) for stage in (2, 3) for mode in ("planned", "embeddings-first")),
    ("gpt2+lora", "zero3-fp32", "rotating", 2),
]


@pytest.mark.parametrize(
    ("kind", "name", "mode", "world_size"), [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_it_trains_as_the_oracle(staged_runs: StagedRuns, kind: str, name: str, mode: str, world_size: int) -> None:
    runs = staged_runs(name, mode, kind=kind, world_size=world_size)
    numerics = ALL[name].numerics
    device = "cuda" if has_gpu_each(world_size) else "cpu"
    expected = oracle(kind, MODES[mode][0], world_size, numerics, device)
    assert_agree(runs, expected, tolerance_for(numerics))
    trained = {
        parameter
        for before, after in zip(expected.weights, expected.weights[1:], strict=False)
        for parameter in after
        if not torch.equal(before[parameter], after[parameter])
    }
    assert trained, "something trains after the first phase"


def shares(flavour: str) -> dict[str, Any]:
    """Whether this rank's share of some group holds no parameter, and how many elements the smallest tensor has."""
    from progtuning_ds.zero.held_state import held_buffers

    engine, stages = build_staged(ALL[flavour], shrinking(), "plan", "narrow+rank1")
    for step in range(6):
        stages.advance(step)
        optimizer_step(engine, "narrow+rank1", step)
    held = held_buffers(stages.adapter)
    return {"empty": [not buffer.spans for buffer in held], "state": [bool(buffer.master.numel()) for buffer in held]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
def test_some_ranks_really_have_nothing_of_a_group(ranks: RankPools, name: str) -> None:
    smallest = min(p.numel() for p in build_model("narrow+rank1").parameters() if p.requires_grad)
    assert smallest < 4
    runs = ranks(4).run(shares, flavour=name)
    assert any(any(run["empty"]) for run in runs)
    assert not all(all(run["empty"]) for run in runs)


def test_stages_above_the_last_adapter_train_the_head_alone() -> None:
    from progtuning_ds import plan_stages
    from progtuning_ds.blocks import discover_blocks

    blocks = discover_blocks(build_model("bert+low"))
    plan = plan_stages(num_blocks=6, num_stages=3, total_steps=6)
    names = [blocks.trainable_names(stage) for stage in plan.stages]
    assert any(".layer.0." in name for name in names[0])
    assert names[1] == names[2]
    assert all("classifier" in name for name in names[1])


def test_a_tied_weight_appears_once_and_trains_with_the_embeddings() -> None:
    from progtuning_ds.blocks import discover_blocks

    model = build_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    blocks = discover_blocks(model)
    assert "transformer.wte.weight" in blocks.embeddings
    assert "lm_head.weight" not in blocks.order
