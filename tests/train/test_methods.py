"""Whole runs of every method: what is exported computes what the engine computed, and the base is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from progtuning_ds.config import ModelConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.methods import (
    Method,
    apply_method,
    check_mergeable,
    keep_trainable,
    load_bottlenecks,
    misread_inputs,
    quantized_loading,
)
from progtuning_ds.train.export import save_merged
from progtuning_ds.train.models import load_model
from progtuning_ds.train.records import RunRecord, StageRecord, read_records
from tests.methods.test_methods import stir
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_resume import run, same_results
from tests.train.test_run import score, settings, train


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("sources"), 58, 23)


def loaded(folder: Path, base: Path, method: dict[str, Any]) -> Any:
    """What a user of the export would load, the way its card says; on the base as the run had it."""
    described = Method(**{name: value for name, value in method.items() if name != "merge"})
    if not described.adds_parameters:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    quantized = quantized_loading(described, torch.float32, ["classifier"])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, **quantized)
    keep_trainable(model)
    return PeftModel.from_pretrained(model, folder) if described.uses_peft else load_bottlenecks(model, folder)


def named(value: object) -> str | None:
    """A name for a case: `lora-nf4` rather than `method3`."""
    if not isinstance(value, dict):
        return None
    return "-".join(str(word) for word in value.values() if isinstance(word, str))


CASES = [
    ("zero2", {"kind": "lora", "rank": 4, "merge": True}),
    ("zero3", {"kind": "adapter", "reduction": 4}),
    ("zero2", {"kind": "lora", "quantization": "nf4"}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("zero1", {"kind": "dora"}),
            ("zero3", {"kind": "rslora", "targets": ["all-linear"]}),
            ("zero3", {"kind": "ia3", "merge": True}),
            ("zero2", {"kind": "ia3"}),
            ("zero2", {"kind": "adapter", "placement": "pfeiffer", "quantization": "int8"}),
            ("zero2", {"kind": "bitfit"}),
            ("zero3", {"kind": "bitfit"}),
            ("zero3", {"kind": "layernorm"}),
            ("zero3", {"kind": "lora", "quantization": "nf4"}),
            ("zero2", {"kind": "lora", "quantization": "nf4", "double_quant": False}),
            ("zero3", {"kind": "lora", "quantization": "int8"}),
        )
    ),
]


@pytest.mark.parametrize(("deepspeed", "method"), CASES, ids=named)
def test_the_export_computes_what_the_engine_computed(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, method: dict[str, Any]
) -> None:
    made = settings(sources, tmp_path, deepspeed=deepspeed, method=method, train={"learning_rate": 2e-2})
    ranks(2).run(train, given=made)
    (record,), stages = read_records(tmp_path, RunRecord), read_records(tmp_path, StageRecord)
    assert stages[1].trainable_params < stages[0].trainable_params
    expected = record.metrics["validation"]
    model = loaded(tmp_path / "final", sources / "model", method)
    accuracy, loss = score(model, tmp_path)
    # Int8 layers round activations by the largest of a batch, so a row alone comes out otherwise.
    rough = method.get("quantization") == "int8"
    assert loss == pytest.approx(expected["loss"], abs=2e-2 if rough else 1e-5)
    assert accuracy == pytest.approx(expected["accuracy"], abs=0.1 if rough else 1e-9)
    if method.get("merge"):
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert score(merged, tmp_path)[1] == pytest.approx(loss, abs=1e-5)
    card = (tmp_path / "final" / "README.md").read_text()
    embeddings = "embeddings, " if method["kind"] in ("bitfit", "layernorm") else ""
    assert f"| {embeddings}blocks 0-3, head |" in card
    assert f"- Method: {method['kind']}" in card
    assert f"# {sources / 'model'}, fine-tuned by progtuning with {method['kind']}" in card
    library = "peft" if isinstance(model, PeftModel) else "transformers"
    assert yaml.safe_load(card.split("---")[1])["library_name"] == library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "method"),
    [
        ("zero2", {"kind": "lora", "quantization": "nf4"}),
        ("zero3", {"kind": "lora", "quantization": "nf4"}),
        ("zero3", {"kind": "adapter"}),
        ("zero1", {"kind": "bitfit"}),
    ],
    ids=named,
)
def test_a_run_of_a_method_goes_on_to_the_bit(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, method: dict[str, Any]
) -> None:
    whole, parts = (
        settings(sources, tmp_path / name, deepspeed=deepspeed, method=method) for name in ("whole", "parts")
    )
    assert ranks(2).run(run, given=whole) == [None, None]
    assert ranks(2).run(run, given=parts, signal_at=6)[0].startswith("PreemptedError")
    assert ranks(2).run(run, given=parts, resume="auto") == [None, None]
    same_results(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_merge_under_a_head_of_several_layers(sources: Path, tmp_path: Path, kind: str) -> None:
    roberta(tmp_path / "base")
    base = tf.RobertaForSequenceClassification.from_pretrained
    model = apply_method(base(tmp_path / "base"), Method(kind=kind)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapters")
    tokenizer = tf.AutoTokenizer.from_pretrained(sources / "model")
    save_merged(base(tmp_path / "base"), tmp_path / "adapters", tokenizer, tmp_path / "merged")
    rows = torch.arange(3, 11).reshape(2, 4)
    torch.testing.assert_close(base(tmp_path / "merged").eval()(rows).logits, model(rows).logits)


def roberta(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    tf.RobertaForSequenceClassification(tf.RobertaConfig(**sizes, vocab_size=50)).save_pretrained(folder)


def test_merging_into_a_tied_weight_is_refused() -> None:
    gpt2 = tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    for device in ("cpu", "meta"):
        with torch.device(device):
            tied, untied = (
                apply_method(tf.GPT2LMHeadModel(gpt2), Method(kind="lora", targets=targets))
                for targets in (("wte", "c_attn"), ("c_attn",))
            )
        check_mergeable(untied)
        with pytest.raises(ConfigError, match=r"method.merge must be false where wte is adapted.* tied to '.*lm_head'"):
            check_mergeable(tied)


def test_a_head_that_would_be_saved_nowhere_has_to_train(sources: Path, tmp_path: Path) -> None:
    """The files of the base have none, so it is drawn; with another number of classes it is drawn too."""
    auto = tf.AutoModelForSequenceClassification

    def load(path: Path, method: Method, classes: int = 2) -> Any:
        model = ModelConfig(path=str(path))
        return load_model(auto, model, tf.AutoConfig.from_pretrained(path, num_labels=classes), "fp32", method)

    auto.from_pretrained(sources / "model", num_labels=2).save_pretrained(tmp_path)
    for path, classes in ((sources / "model", 2), (tmp_path, 3)):
        for kind in ("lora", "adapter"):
            load(path, Method(kind=kind), classes)
            with pytest.raises(
                ConfigError, match=r"method.train_head must be true with .* no weights for 'classifier'"
            ):
                load(path, Method(kind=kind, train_head=False), classes)
    load(tmp_path, Method(kind="lora", train_head=False))
    load(sources / "model", Method(kind="bitfit", train_head=False))  # saved whole


def test_weights_that_the_processor_misreads_are_warned_of(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    method = {"kind": "lora", "quantization": "nf4"}
    model = AutoModelForSequenceClassification.from_pretrained(
        sources / "model", num_labels=2, **quantized_loading(Method(**method), torch.float32, ["classifier"])
    )
    inputs = misread_inputs(model)
    said = ranks(2).run(printed, given=settings(sources, tmp_path, method=method, train={"epochs": 1}))[0]
    words = f"bitsandbytes reads NF4 weights with {', '.join(map(str, inputs))} inputs wrongly"
    assert (words in said) == bool(inputs)
    assert ("inputs wrongly" in said) == bool(inputs)


def printed(given: dict[str, Any]) -> str:
    """What the program prints while it trains."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(given)
    return said.getvalue()
