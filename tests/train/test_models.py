"""The model's shape, tokenizer and limits are known before its weights are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from progtuning_ds.config import ModelConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.train.models import (
    empty_model,
    hidden_size,
    load_shape,
    load_tokenizer,
    max_positions,
)

TINY = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def save_tokenizer(folder: Path, **special: str) -> ModelConfig:
    words = {"a": 0, "b": 1, "<end>": 2, "<unk>": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=2).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        (BertConfig(**TINY, max_position_embeddings=40), 40),
        (RobertaConfig(**TINY, max_position_embeddings=42, pad_token_id=1), 40),
        (GPT2Config(vocab_size=32, n_positions=40, n_embd=8, n_layer=1, n_head=2), 40),
        (LlamaConfig(**TINY, max_position_embeddings=40), 40),
        (ModernBertConfig(**TINY, pad_token_id=0, max_position_embeddings=40), 40),
        (T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_longest_sequence_is_known_from_the_shape(shape: object, limit: int | None) -> None:
    assert max_positions(ModelConfig(path="unused"), shape) == limit


def test_the_width_is_known_from_the_shape() -> None:
    assert hidden_size(BertConfig(**TINY)) == 8
    assert hidden_size(GPT2Config(n_embd=24)) == 24


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path, eos_token="<end>")
    shape = load_shape(model)
    assert load_tokenizer(model, shape).pad_token_id == 2
    assert shape.pad_token_id == 2


def test_a_tokenizer_without_any_special_token_is_one_line(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="has no token to pad with"):
        load_tokenizer(model, load_shape(model))


def test_a_missing_model_is_one_line_with_the_nearest_folder(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "my-model")
    with pytest.raises(ConfigError) as caught:
        load_shape(ModelConfig(path=str(tmp_path / "my-modle")))
    assert "\n" not in str(caught.value)
    assert "did you mean 'my-model'?" in str(caught.value)


def test_a_model_without_tokenizer_is_one_line(tmp_path: Path) -> None:
    BertConfig(**TINY).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(model, load_shape(model))
    assert str(caught.value).startswith("model.path: no tokenizer in")
    assert "\n" not in str(caught.value)


def test_an_unknown_attention_is_one_line() -> None:
    model = ModelConfig(path="unused", attn_implementation="fast")
    with pytest.raises(ConfigError) as caught:
        empty_model(AutoModelForSequenceClassification, model, BertConfig(**TINY))
    assert "\n" not in str(caught.value)
