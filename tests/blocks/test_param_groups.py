"""Groups laid out for the plan: what freezes next is at the tail, and everything that trains is in one group."""

from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from progtuning_ds.blocks import BlockMap, discover_blocks
from progtuning_ds.errors import ConfigError
from progtuning_ds.grouping import param_groups
from progtuning_ds.schedule import EMBEDDINGS, StagePlan, custom_plan, plan_stages
from tests.blocks.families import build

BLOCKS = 7


def seven_blocks() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            hidden_size=8, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=8, vocab_size=20
        )
    )


MODEL = seven_blocks()
MAP = discover_blocks(MODEL)
NAMES = {id(parameter): name for name, parameter in MODEL.named_parameters()}


def names_of(group: dict[str, Any]) -> list[str]:
    return [NAMES[id(parameter)] for parameter in group["params"]]


def labels(groups: list[dict[str, Any]]) -> list[str]:
    return [group["name"] for group in groups]


def test_a_pair_for_every_part_with_the_lowest_at_the_tail() -> None:
    groups = param_groups(MODEL, plan_stages(BLOCKS, 3, 9), MAP, weight_decay=0.1)
    assert labels(groups) == [
        "always.decay",
        "always.no_decay",
        "part1.decay",
        "part1.no_decay",
        "part0.decay",
        "part0.no_decay",
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 3
    always = {name for group in groups[:2] for name in names_of(group)}
    assert always == {*MAP.embeddings, *MAP.blocks[4], *MAP.blocks[5], *MAP.blocks[6], *MAP.head}
    assert {name for group in groups[4:] for name in names_of(group)} == {*MAP.blocks[0], *MAP.blocks[1]}


def test_biases_and_norms_do_not_decay() -> None:
    norms = {f"{name}.weight" for name, module in MODEL.named_modules() if isinstance(module, nn.LayerNorm)}
    expected = norms | {name for name in MAP.order if name.endswith(".bias")}
    groups = param_groups(MODEL, plan_stages(BLOCKS, 2, 2), MAP, weight_decay=0.1)
    assert {name for group in groups if not group["weight_decay"] for name in names_of(group)} == expected
    assert all(("no_decay" in group["name"]) == (group["weight_decay"] == 0) for group in groups)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "modernbert"])
def test_rms_norms_do_not_decay_either(family: str) -> None:
    model = build(family, "sequence-classification")
    groups = param_groups(model, plan_stages(3, 3, 3), discover_blocks(model), weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names.values()}
    assert plain == {name for name, owner in owners.items() if "Norm" in type(owner).__name__ or name.endswith(".bias")}


def test_no_decay_patterns_replace_the_rule() -> None:
    groups = param_groups(MODEL, plan_stages(BLOCKS, 1, 1), MAP, weight_decay=0.1, no_decay=["*embeddings*"])
    assert labels(groups) == ["always.decay", "always.no_decay"]
    assert names_of(groups[1]) == list(MAP.embeddings)


def test_first_stage_embeddings_leave_with_the_first_part() -> None:
    groups = param_groups(MODEL, plan_stages(BLOCKS, 7, 7, "first_stage"), MAP)
    tail = {name for group in groups if group["name"].startswith("part0.") for name in names_of(group)}
    assert tail == {*MAP.embeddings, *MAP.blocks[0]}


def test_never_trained_embeddings_are_in_no_group_and_require_no_grad() -> None:
    groups = param_groups(MODEL, plan_stages(BLOCKS, 2, 2, "never"), MAP)
    assert not set(MAP.embeddings) & {name for group in groups for name in names_of(group)}
    assert not any(p.requires_grad for name, p in MODEL.named_parameters() if name in MAP.embeddings)


def test_what_always_trains_is_at_the_front() -> None:
    plan = plan_stages(BLOCKS, 7, 7, "never", always_train=["*.LayerNorm.*"])
    groups = param_groups(MODEL, plan, MAP)
    assert {n for n in MAP.order if "LayerNorm" in n} <= {n for g in groups[:2] for n in names_of(g)}
    assert not any("LayerNorm" in name for group in groups[2:] for name in names_of(group))


def test_what_joins_later_is_in_no_group_yet() -> None:
    plan = custom_plan(BLOCKS, [{"blocks": "6", "steps": 1}, {"blocks": "0,5-6", "steps": 1}])
    groups = param_groups(MODEL, plan, MAP)
    assert labels(groups) == ["always.decay", "always.no_decay"]
    found = {name for group in groups for name in names_of(group)}
    assert found == {*MAP.embeddings, *MAP.blocks[6], *MAP.head}
    assert {name for name, p in MODEL.named_parameters() if p.requires_grad} == found


@st.composite
def shrinking_plans(draw: st.DrawFn) -> StagePlan:
    always = draw(st.sampled_from([(), ("*LayerNorm*",), ("bert.pooler.*", "*.3.*"), ("*embeddings*",)]))
    if draw(st.booleans()):
        stages = draw(st.integers(1, BLOCKS))
        return plan_stages(BLOCKS, stages, stages, draw(st.sampled_from(EMBEDDINGS)), always_train=always)
    left, embeddings, written = set(range(BLOCKS)), draw(st.booleans()), []
    for _ in range(draw(st.integers(1, 4))):
        written.append({"blocks": sorted(left), "steps": 1, "embeddings": embeddings})
        left -= draw(st.sets(st.integers(0, BLOCKS - 1), max_size=3))
        embeddings = embeddings and draw(st.booleans())
    return custom_plan(BLOCKS, written, always_train=always)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(shrinking_plans())
def test_every_stage_of_a_shrinking_plan_trains_a_prefix_of_the_groups(plan: StagePlan) -> None:
    groups = param_groups(MODEL, plan, MAP, weight_decay=0.1)
    assert all(group["params"] for group in groups)
    assert len(set(labels(groups))) == len(groups)
    everything = [name for group in groups for name in names_of(group)]
    assert len(set(everything)) == len(everything)
    for stage in plan.stages:
        trains = set(MAP.trainable_names(stage, plan.always_train))
        kept = [bool(trains & set(names_of(group))) for group in groups]
        assert kept == sorted(kept, reverse=True)
        assert {name for group, keep in zip(groups, kept, strict=True) if keep for name in names_of(group)} == trains
    assert {name for name, p in MODEL.named_parameters() if p.requires_grad} == set(everything)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(shrinking_plans())
def test_groups_keep_model_order_inside(plan: StagePlan) -> None:
    for group in param_groups(MODEL, plan, MAP):
        assert names_of(group) == sorted(names_of(group), key=MAP.order.index)


def lora_model() -> tuple[nn.Module, BlockMap]:
    config = LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[0, 2], task_type="SEQ_CLS")
    model = get_peft_model(build("bert", "sequence-classification"), config)
    return model, discover_blocks(model)


def test_a_lora_base_enters_no_group_and_never_requires_grad() -> None:
    model, blocks = lora_model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plan = plan_stages(3, 3, 3)
    groups = param_groups(model, plan, blocks, weight_decay=0.1)
    assert {names[id(p)] for group in groups for p in group["params"]} == trainable
    assert labels(groups) == ["always.decay", "always.no_decay", "part0.decay"]  # block 1 has no adapter
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    last = blocks.trainable_names(plan.stages[2])
    assert set(last) < trainable
    assert all("lora" in name or "classifier" in name for name in last)


def test_the_copy_that_peft_trains_of_a_head_is_the_head() -> None:
    _, blocks = lora_model()
    copies = [name for name in blocks.order if "modules_to_save" in name]
    assert copies
    assert {blocks.component_of(name) for name in copies} == {"head"}
    assert not blocks.frozen & set(copies)


def test_a_torch_optimizer_takes_the_groups() -> None:
    groups = param_groups(MODEL, plan_stages(BLOCKS, 3, 3), MAP, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0] * 3


def test_plan_and_model_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"plan\.num_blocks must be 7 as the model's, got 6"):
        param_groups(MODEL, plan_stages(6, 2, 2), MAP)


def test_a_model_without_a_trainable_parameter_is_refused() -> None:
    model = build("bert", "sequence-classification").requires_grad_(False)
    with pytest.raises(ConfigError, match="plan must train something in stage 0"):
        param_groups(model, plan_stages(3, 1, 1), discover_blocks(model))
