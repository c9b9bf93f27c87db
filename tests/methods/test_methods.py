"""What each method trains, how it is saved, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel

from progtuning_ds import plan_stages
from progtuning_ds.blocks import component_counts, discover_blocks
from progtuning_ds.errors import ConfigError
from progtuning_ds.methods import KINDS, Method, apply_method, blocks_path, load_bottlenecks
from progtuning_ds.methods.bottleneck import bottleneck_state, save_bottlenecks
from progtuning_ds.methods.heads import head_modules
from progtuning_ds.methods.quantized import keep_trainable, misread_inputs, quantized_loading, unquantized_modules

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
IDS = torch.arange(1, 9).reshape(2, 4)


def bert(num_labels: int = 3) -> Any:
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(tf.BertConfig(**TINY, num_labels=num_labels)).eval()


def distilbert() -> Any:
    return FAMILIES["distilbert"]()


def llama() -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval()


def trained(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def stir(model: Any) -> None:
    """Give what trains values of its own: updates begin at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


# Per block of BERT-base; first principles: LoRA on query and value, 2 matrices of 768 x 8 each; DoRA adds a magnitude
# per output; IA3 scales key and value outputs and the inputs of "output.dense", which PEFT finds in attention too;
# adapters 768-48-768 twice.
PER_BLOCK = {
    "full": 7_087_872,
    "lora": 2 * 2 * 768 * 8,
    "rslora": 2 * 2 * 768 * 8,
    "dora": 2 * (2 * 768 * 8 + 768),
    "ia3": 768 + 768 + 768 + 3072,
    "adapter": 2 * (768 * 48 + 48 + 48 * 768 + 768),
    "bitfit": 4 * 768 + 768 + 3072 + 768 + 768,
    "layernorm": 2 * 2 * 768,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_trains_what_the_method_says(kind: str) -> None:
    with torch.device("meta"):
        model = apply_method(tf.BertForSequenceClassification(tf.BertConfig()), Method(kind=kind))
    counts = component_counts(model, discover_blocks(model))
    assert set(counts.blocks) == {PER_BLOCK[kind]}
    if kind != "full":
        assert counts.head >= 2 * 768 + 2, "the classifier trains"


def test_houlsbys_adapters_are_the_papers_1789056_and_pfeiffers_half_of_them() -> None:
    for placement, expected in (("houlsby", 1_789_056), ("pfeiffer", 894_528)):
        with torch.device("meta"):
            model = apply_method(
                tf.BertForSequenceClassification(tf.BertConfig()), Method(kind="adapter", placement=placement)
            )
        assert sum(component_counts(model, discover_blocks(model)).blocks) == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_a_stage_trains_the_methods_parameters_of_its_blocks_and_the_head(kind: str) -> None:
    model = apply_method(bert(), Method(kind=kind))
    blocks = discover_blocks(model)
    plan = plan_stages(num_blocks=3, num_stages=3, total_steps=3)
    for stage in plan.stages:
        names = blocks.trainable_names(stage)
        assert set(names) <= set(trained(model))
        in_blocks = {blocks.component_of(name) for name in names} - {"embeddings", "head"}
        assert in_blocks == set(stage.trainable_blocks)
        assert any("classifier" in name for name in names)


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)),
    "llama": llama,
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=50,
                     word_embed_proj_dim=32, max_position_embeddings=16)
    ),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=50)
    ),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TINY)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TINY)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TINY, num_key_value_heads=2)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TINY, pad_token_id=0)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=50)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, vocab_size=50)
    ),
}  # fmt: skip


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_fit_every_block_of_every_family_and_begin_as_nothing(family: str, placement: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "t5" else {})
    before = model(**inputs).logits
    model = apply_method(model, Method(kind="adapter", placement=placement, reduction=4))
    # Weights that need no gradient may take another path through the same sums.
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)
    added = {name for name, _ in model.named_parameters() if ".adapter_" in name}
    assert added <= set(trained(model)) <= added | {n for n, _ in model.named_parameters() if "classifier" in n}
    blocks = discover_blocks(model)
    for block in blocks.blocks:
        assert any(name not in blocks.frozen for name in block)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("family", "names"), [("distilbert", {"q_lin", "v_lin"}), ("phi3", {"qkv_proj"})])
def test_queries_and_values_are_found_where_peft_does_not_know_the_family(
    family: str, names: set[str], kind: str
) -> None:
    model = apply_method(FAMILIES[family](), Method(kind=kind, rank=2, train_head=False))
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == names
    assert len(adapted) == len(discover_blocks(model)) * len(names)


def test_what_a_task_adds_is_the_head_and_the_base_is_not() -> None:
    """Also where the base has no module of its own (T5), and in a base without any head."""
    t5, bert_config = tf.T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, vocab_size=50), bert().config
    assert head_modules(FAMILIES["t5"]()) == []
    assert head_modules(tf.T5ForQuestionAnswering(t5)) == ["qa_outputs"]
    assert head_modules(tf.T5ForSequenceClassification(t5)) == ["classification_head"]
    assert head_modules(tf.BertModel(bert_config)) == []
    assert head_modules(tf.BertForQuestionAnswering(bert_config)) == ["qa_outputs"]
    assert head_modules(tf.DistilBertForSequenceClassification(tf.DistilBertConfig(n_layers=2))) == [
        "pre_classifier",
        "classifier",
    ]
    for kind, expected in (("lora", 4 * 6), ("layernorm", 2 * 2 + 2 * 3 + 2)):
        model = apply_method(FAMILIES["t5"](), Method(kind=kind))
        names = trained(model)
        assert len(names) == expected, names


@pytest.mark.parametrize("kind", ["lora", "ia3", "adapter", "bitfit"])
def test_a_head_that_is_not_to_train_does_not(kind: str) -> None:
    model = apply_method(bert(), Method(kind=kind, train_head=False))
    assert not any("classifier" in name for name in trained(model))


def test_saved_bottlenecks_give_the_same_logits_on_a_fresh_base(tmp_path: Path) -> None:
    model = apply_method(bert(), Method(kind="adapter", reduction=4))
    stir(model)
    state = dict(model.named_parameters())
    names = bottleneck_state(model, model.bottleneck_config)
    assert set(trained(model)) == set(names)
    save_bottlenecks({name: state[name].detach() for name in names}, model.bottleneck_config, tmp_path)
    again = load_bottlenecks(bert(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "ia3"])
def test_pefts_own_loader_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    model = apply_method(bert(), Method(kind=kind, rank=4))
    stir(model)
    model.eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, expected)
    merged = again.merge_and_unload().eval()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_block_path_of_the_bare_model_is_found_in_a_wrapped_one() -> None:
    model = apply_method(bert(), Method(kind="lora"))
    path = blocks_path(model, "bert.encoder.layer")
    assert len(discover_blocks(model, path=path)) == 3
    assert blocks_path(bert(), "bert.encoder.layer") == "bert.encoder.layer"


def test_widths_that_the_processor_misreads_are_found() -> None:
    widths = (32, 64, 96, 100, 128, 144, 33)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Linear4bit(width, 48, quant_type="nf4") for width in widths)).to("cpu")
    wrong = set()
    for width, layer in zip(widths, model, strict=True):
        weight = torch.randn(48, width)
        read = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
        largest = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
        limit = 0.16 * largest.repeat_interleave(64)[: weight.numel()].view_as(weight)  # the widest gap's half is 0.152
        if ((read - weight).abs() > limit).any():
            wrong.add(layer.in_features)
    assert misread_inputs(model) == sorted(wrong)
    assert misread_inputs(torch.nn.Linear(32, 32)) == []


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_takes_gradients_before_and_after_an_evaluation(
    tmp_path: Path, kind: str, double_quant: bool
) -> None:
    bert().save_pretrained(tmp_path)
    method = Method(kind="lora", quantization=kind, double_quant=double_quant, rank=4)
    skip = unquantized_modules(bert())
    assert skip == ["classifier"]
    model = tf.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, **quantized_loading(method, torch.float32, skip)
    )
    keep_trainable(model)
    model = apply_method(model, method)
    stir(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()
        torch.manual_seed(0)
        model(IDS, labels=torch.tensor([0, 1])).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(IDS)
    after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    lowest = [n for n, p in model.named_parameters() if "layer.0." in n and p.requires_grad and p.grad.any()]
    assert lowest, "gradients reach the lowest block"
    stored = {p.dtype for n, p in model.named_parameters() if "layer.0.intermediate.dense.weight" in n}
    assert stored == ({torch.uint8} if kind == "nf4" else {torch.int8})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "lara"}, "method.kind must be one of .*did you mean 'lora'"),
        ({"kind": "lora", "rank": 0}, "method.rank must be at least 1, got 0"),
        ({"kind": "adapter", "placement": "hulsby"}, "did you mean 'houlsby'"),
        ({"kind": "bitfit", "quantization": "nf4"}, "method.quantization must be none with method.kind bitfit"),
        ({"kind": "bitfit", "targets": ["query"]}, "method.targets must be empty with method.kind bitfit"),
        ({"kind": "lora", "targets": ["all-linear", "query"]}, "method.targets must be all-linear alone"),
        ({"kind": "full", "quantization": "int8"}, "method.quantization must be none with method.kind full"),
    ],
)
def test_wrong_settings_get_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Method(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        (bert, Method(kind="lora", targets=("qury",)), "method.targets: 'qury' fits no module; did you mean 'query'"),
        (bert, Method(kind="lora", targets=("query", "valu")), "method.targets: 'valu' .*did you mean 'value'"),
        (bert, Method(kind="lora", targets=("all_linear",)), "did you mean 'all-linear'"),
        (bert, Method(kind="lora", targets=("classifier",)), r"method.targets \['classifier'\] cannot be adapted: "),
        (bert, Method(kind="adapter", targets=("output.dens",)), "'output.dens' .*did you mean 'output.dense'"),
        (bert, Method(kind="adapter", targets=("query", "foo")), "method.targets: 'foo' fits no module"),
        (bert, Method(kind="adapter", targets=("pooler.dense",)), "method.targets: block 0 has no pooler.dense among"),
        (llama, Method(kind="bitfit"), "method.kind bitfit finds nothing to train: blocks of llama have no biases"),
        (distilbert, Method(kind="ia3"), "method.targets must be given for distilbert .* attention.q_lin"),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused_in_one_line(
    model: Callable[[], Any], method: Method, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        apply_method(model(), method)
    assert "\n" not in str(caught.value)


def test_adapters_for_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no adapter_config\.json"):
        load_bottlenecks(bert(), tmp_path)
    model = apply_method(bert(), Method(kind="adapter"))
    save_bottlenecks({}, model.bottleneck_config, tmp_path)
    with pytest.raises(ConfigError, match="are for another model"):
        load_bottlenecks(llama(), tmp_path)
