"""Under ZeRO-3 the parameters of a rank are empty; blocks, counts and groups come out as without it."""

from dataclasses import astuple
from typing import Any

import pytest
import torch

from progtuning_ds.blocks import component_counts, discover_blocks, set_trainable
from progtuning_ds.grouping import param_groups
from progtuning_ds.schedule import plan_stages
from tests.blocks.families import build
from tests.ranks import RankPools

CASES = [("bert", "sequence-classification"), ("llama_tied", "causal-lm"), ("deberta_v2", "question-answering")]


def describe(model: torch.nn.Module) -> dict[str, Any]:
    blocks = discover_blocks(model)
    groups = param_groups(model, plan_stages(len(blocks), 3, 3, "first_stage"), blocks, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        "blocks": (blocks.path, blocks.embeddings, blocks.blocks, blocks.head),
        "counts": astuple(component_counts(model, blocks, always_train=("*orm*",))),
        "groups": [(g["name"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups],
    }


def describe_partitioned(family: str, head: str) -> dict[str, Any]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    model = build(family, head)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    before = describe(model)

    blocks = discover_blocks(model)
    set_trainable(model, blocks.order)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    after = describe(engine.module)
    engine.destroy()
    return {"before": before, "after": after}


@pytest.mark.parametrize(("family", "head"), CASES)
def test_partitioned_parameters_are_found_counted_and_grouped(ranks: RankPools, family: str, head: str) -> None:
    whole = describe(build(family, head))
    for result in ranks(2).run(describe_partitioned, family=family, head=head):
        assert result["before"] == whole
        assert result["after"] == whole
