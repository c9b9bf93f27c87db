"""Quantized layers compute with just what they say, in every family, and become what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from progtuning_ds import plan_stages
from progtuning_ds.blocks import discover_blocks, full_shape
from progtuning_ds.methods import Method, apply_method
from progtuning_ds.methods.frozen_linear import dense_weight, freezable, frozen_layers, owner, quantize, restore
from progtuning_ds.on_freeze import freezing_blocks, weight_bytes, why_not
from progtuning_ds.schedule import custom_plan
from tests.methods.test_methods import FAMILIES, IDS, TINY, bert

KINDS = ("int8", "nf4")
# Blocks that read a layer's weight themselves: its dtype, or to multiply by it.
READERS = {
    "longt5": lambda: tf.LongT5ForConditionalGeneration(
        tf.LongT5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, vocab_size=50, local_radius=4)
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}


def quantize_all(model: Any, kind: str) -> list[str]:
    names = list(freezable(model, discover_blocks(model)))
    for name in names:
        layer = owner(model, name)
        layer.weight = quantize(layer, layer.weight.data, kind)
    return names


def logits_and_gradients(model: Any, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family.endswith("t5") else {})
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, *READERS, "bert"])
def test_it_computes_with_the_dense_weight_it_tells_and_becomes_what_it_was(family: str, kind: str) -> None:
    torch.manual_seed(0)
    model = (FAMILIES | READERS | {"bert": bert})[family]().eval()
    before = {name: (p.shape, p.dtype, p.clone()) for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    names = quantize_all(model, kind)
    assert len(names) >= 4 * len(discover_blocks(model))
    assert {name for name, _ in frozen_layers(model)} == set(names)
    assert all(full_shape(p) == tuple(before[n][0]) for n, p in model.named_parameters())
    logits, gradients = logits_and_gradients(model, family)
    for _, layer in list(frozen_layers(model)):
        layer.weight = restore(layer, dense_weight(layer))
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    again, theirs = logits_and_gradients(model, family)
    torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-5)
    assert gradients, "backward reaches what is below"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)
    for name, parameter in model.named_parameters():
        shape, dtype, value = before[name]
        assert (parameter.shape, parameter.dtype) == (shape, dtype)
        if name in names:
            bound = 0.16 if kind == "nf4" else 0.5 / 127 * 1.01
            assert 0 < (parameter - value).abs().max() <= bound * value.abs().max()
        else:
            assert torch.equal(parameter, value)


def test_what_is_tied_used_elsewhere_wanted_in_fp32_or_of_a_methods_base_is_left_alone() -> None:
    t5 = FAMILIES["t5"]()
    assert t5._keep_in_fp32_modules, "T5 asks for it"
    assert not any(name.endswith("wo.weight") for name in freezable(t5, discover_blocks(t5)))
    model = bert()
    attention = model.bert.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    names = freezable(model, discover_blocks(model))
    assert "bert.encoder.layer.0.attention.self.value.weight" in names
    assert "bert.encoder.layer.0.attention.self.query.weight" not in names
    lora = apply_method(bert(), Method(kind="lora"))
    assert not any("base_layer" in name for name in freezable(lora, discover_blocks(lora)))


def test_bytes_are_those_of_the_tensors_and_the_closed_form() -> None:
    with torch.device("cpu"):
        layer = torch.nn.Linear(768, 3072)
    for kind, expected in (("nf4", 768 * 3072 // 2 + 36864 + 4 * 144 + 4), ("int8", 768 * 3072 + 4 * 3072)):
        assert weight_bytes(kind, 3072, 768, element=4) == expected
        assert weight_bytes("keep", 3072, 768, element=2) == 2 * 768 * 3072
    layer.weight = quantize(layer, layer.weight.data, "nf4")
    assert dict(layer.named_parameters())["weight"].numel() == 768 * 3072 // 2
    assert layer.weight.shape == (3072, 768), "whoever reads it gets what the layer computes with"


def test_under_zero3_it_is_refused_where_it_does_not_pay() -> None:
    plan = plan_stages(num_blocks=4, num_stages=2, total_steps=4)
    shapes = [(768, 768), (3072, 768)]
    settings: dict[str, Any] = {"element": 2, "offloads_parameters": False}
    assert why_not("nf4", plan, shapes, sharing_ranks=64, **settings) is None
    said = why_not("nf4", plan, shapes, sharing_ranks=128, **settings)
    assert said is not None
    assert said.startswith("it does not pay on 128 ranks: of these weights a rank holds 46,080 bytes, and with nf4 ")
    assert (
        why_not("int8", plan, [], sharing_ranks=1, **settings)
        == "the blocks have no layers of class nn.Linear (or GPT-2's Conv1D)"
    )
    offloaded = why_not("int8", plan, shapes, sharing_ranks=2, element=2, offloads_parameters=True)
    assert offloaded is not None
    assert "offload_param" in offloaded


def test_blocks_freeze_for_good_when_no_later_stage_trains_them() -> None:
    plan = custom_plan(4, [{"blocks": b, "steps": 1} for b in ("1-3", "1,3", "3")])
    assert [freezing_blocks(plan, stage) for stage in range(3)] == [(0,), (0, 2), (0, 1, 2)]
    growing = custom_plan(4, [{"blocks": b, "steps": 1} for b in ("2-3", "3", "2-3")])
    said = why_not("nf4", growing, [(64, 64)], element=4, sharing_ranks=1, offloads_parameters=False)
    assert said == "block 2 trains again in stage 2, and what was quantized cannot"


def test_autocast_and_16_bit_inputs_compute_in_their_type() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = torch.nn.Linear(64, 32).to(dtype)
        layer.weight = quantize(layer, layer.weight.data, "nf4")
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
        assert dense_weight(layer).dtype == dtype
    layer = torch.nn.Linear(64, 32)
    layer.weight = quantize(layer, layer.weight.data, "int8")
    input = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(input)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert input.grad is not None
    assert layer.bias.grad is not None


def test_gradient_checkpointing_recomputes_through_it() -> None:
    model = tf.BertForSequenceClassification(tf.BertConfig(**TINY)).eval()
    quantize_all(model, "nf4")
    plain = logits_and_gradients(model, "bert")
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = logits_and_gradients(model, "bert")
    assert again[1].keys() == plain[1].keys()
    for name, gradient in again[1].items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-5)
