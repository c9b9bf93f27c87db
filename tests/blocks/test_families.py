"""Discovery against what real forwards and backwards of every family show."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from progtuning_ds.blocks import BlockMap, component_counts, discover_blocks
from tests.blocks.families import ENCODER_DECODERS, FAMILIES, build, config_of, heads_of
from tests.blocks.oracles import (
    call_positions,
    canonical_names,
    modules_depending_on,
    names_with_gradient,
    owners_outside,
)

SINGLE = [(family, head) for family in FAMILIES for head in heads_of(family)]
DOUBLE = [(family, head) for family in ENCODER_DECODERS for head in heads_of(family)]
LORA = [
    ("bert", "sequence-classification"),
    ("deberta_v2", "token-classification"),
    ("gpt2", "causal-lm"),
    ("llama_tied", "causal-lm"),
    ("opt_projected", "question-answering"),
    ("vit", "image-classification"),
]
TASK_TYPES = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "causal-lm": "CAUSAL_LM",
}


def with_lora(model: nn.Module, head: str) -> nn.Module:
    stack = discover_blocks(model).path
    linears = [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{stack}.") and isinstance(module, (nn.Linear, Conv1D))
    ]
    return get_peft_model(model, LoraConfig(r=2, target_modules=linears, task_type=TASK_TYPES.get(head)))


def assert_every_parameter_once(model: nn.Module, blocks: BlockMap) -> None:
    assigned = [*blocks.embeddings, *(name for block in blocks.blocks for name in block), *blocks.head]
    assert sorted(assigned) == sorted(name for name, _ in model.named_parameters())
    assert blocks.order == tuple(name for name, _ in model.named_parameters())


def assert_blocks_are_the_stack(model: nn.Module, blocks: BlockMap) -> None:
    names = canonical_names(model)
    stacked = [block for path in blocks.path.split("+") for block in model.get_submodule(path)]
    assert len(stacked) == len(blocks)
    for module, found in zip(stacked, blocks.blocks, strict=True):
        assert {names[id(parameter)] for parameter in module.parameters()} <= set(found)


def assert_agrees_with_forward_and_backward(model: nn.Module, blocks: BlockMap) -> None:
    """For one stack: run order, dependence on the last block, and gradients when it is cut, all tell the same."""
    stack = model.get_submodule(blocks.path)
    outside = owners_outside(model, [stack])
    last = stack[-1]
    positions = call_positions(model, [*outside, last])
    after = {module for module in outside if module in positions and positions[module] > positions[last]}
    before = {module for module in outside if module in positions and positions[module] < positions[last]}
    assert modules_depending_on(model, last, list(outside)) == after

    early = {name for module in before for name in outside[module]}
    late = {name for module in after for name in outside[module]} - early
    assert early <= set(blocks.embeddings)
    assert late <= set(blocks.head)

    # Not every parameter belongs to a module that is called, but every one that matters gets a gradient.
    assert set(blocks.head) == names_with_gradient(model, last) - early
    assert names_with_gradient(model) == set(blocks.order)


def tied_names(model: nn.Module) -> set[str]:
    places = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return {name for key, name in canonical_names(model).items() if places.count(key) > 1}


@pytest.mark.parametrize(("family", "head"), SINGLE)
def test_embeddings_run_before_the_blocks_and_the_head_after(family: str, head: str) -> None:
    model = build(family, head)
    blocks = discover_blocks(model)
    assert blocks.path.endswith(FAMILIES[family][1])
    assert len(blocks) == config_of(family).num_hidden_layers == 3
    assert not blocks.frozen
    assert_every_parameter_once(model, blocks)
    assert_blocks_are_the_stack(model, blocks)
    assert_agrees_with_forward_and_backward(model, blocks)


def test_every_head_that_must_be_supported_is_tested() -> None:
    heads = {head for _, head in SINGLE}
    assert heads >= {"sequence-classification", "question-answering", "token-classification", "causal-lm"}
    assert {family for family, _ in SINGLE} == set(FAMILIES)
    assert {family for family, _ in DOUBLE} == set(ENCODER_DECODERS)


@pytest.mark.parametrize(("family", "head"), LORA)
def test_lora_changes_neither_stack_nor_order_and_its_base_stays_frozen(family: str, head: str) -> None:
    plain = discover_blocks(build(family, head))
    model = with_lora(build(family, head), head)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    blocks = discover_blocks(model)
    assert blocks.path == f"base_model.model.{plain.path}"
    assert len(blocks) == len(plain)
    assert blocks.frozen == frozen != set()
    assert all(any("lora" in name for name in block) for block in blocks.blocks)
    assert_every_parameter_once(model, blocks)
    assert_blocks_are_the_stack(model, blocks)
    stack = model.get_submodule(blocks.path)
    positions = call_positions(model, [*owners_outside(model, [stack]), stack[-1]])
    for module, names in owners_outside(model, [stack]).items():
        if module in positions and not set(names) & tied_names(model):
            expected = "head" if positions[module] > positions[stack[-1]] else "embeddings"
            assert {blocks.component_of(name) for name in names} == {expected}


@pytest.mark.parametrize(("family", "head"), DOUBLE)
def test_encoder_lies_below_decoder_and_what_is_between_freezes_with_the_encoder(family: str, head: str) -> None:
    model = build(family, head)
    blocks = discover_blocks(model)
    encoder, decoder = (model.get_submodule(path) for path in blocks.path.split("+"))
    assert (len(encoder), len(decoder), len(blocks)) == (3, 2, 5)
    assert encoder in list(model.get_encoder().modules())
    assert decoder in list(model.get_decoder().modules())
    assert_every_parameter_once(model, blocks)
    assert_blocks_are_the_stack(model, blocks)

    outside = owners_outside(model, [encoder, decoder])
    above_encoder = modules_depending_on(model, encoder[-1], list(outside))
    above_decoder = modules_depending_on(model, decoder[-1], list(outside))
    assert above_decoder <= above_encoder
    called = call_positions(model, list(outside))
    for module, names in outside.items():
        if set(names) & tied_names(model):
            assert set(names) <= set(blocks.embeddings)
        elif module in called:
            expected = "head" if module in above_decoder else 2 if module in above_encoder else "embeddings"
            assert {blocks.component_of(name) for name in names} == {expected}
    assert set(blocks.head) <= names_with_gradient(model, decoder[-1])
    assert set(blocks.embeddings) & names_with_gradient(model, decoder[-1]) <= tied_names(model)


@pytest.mark.parametrize(
    ("family", "head"), [(family, heads_of(family)[0]) for family in [*FAMILIES, *ENCODER_DECODERS]]
)
def test_the_meta_device_gives_the_same_map_and_counts(family: str, head: str) -> None:
    real, meta = build(family, head), build(family, head, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    blocks = discover_blocks(meta)
    assert blocks == discover_blocks(real)
    counts = component_counts(meta, blocks)
    assert counts.total == sum(parameter.numel() for parameter in real.parameters())
    assert counts.blocks == tuple(
        sum(p.numel() for p in block.parameters()) + extra
        for block, extra in zip(
            [b for path in blocks.path.split("+") for b in real.get_submodule(path)],
            between_stacks(real, blocks),
            strict=True,
        )
    )


def between_stacks(model: nn.Module, blocks: BlockMap) -> list[int]:
    """Elements of parameters that a block map counts with a block although they are not inside it."""
    inside = {id(p) for path in blocks.path.split("+") for p in model.get_submodule(path).parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) not in inside}
    return [sum(sizes.get(name, 0) for name in block) for block in blocks.blocks]


@pytest.mark.parametrize("family", ["gpt2", "gemma", "llama_tied"])
def test_a_tied_output_weight_counts_once_and_with_the_embeddings(family: str) -> None:
    model = build(family, "causal-lm")
    blocks = discover_blocks(model)
    output = model.get_output_embeddings().weight
    assert output is model.get_input_embeddings().weight
    assert blocks.component_of(canonical_names(model)[id(output)]) == "embeddings"
    unique = {id(p): p.numel() for p in model.parameters()}
    assert component_counts(model, blocks).total == sum(unique.values())


def test_a_tied_weight_registered_first_by_the_head_still_belongs_to_the_embeddings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(4, 7, bias=False)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.tokens = nn.Embedding(7, 4)
            self.output.weight = self.tokens.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.tokens(ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return self.output(hidden)

    blocks = discover_blocks(Tied())
    assert blocks.embeddings == ("output.weight",)
    assert blocks.head == ()
