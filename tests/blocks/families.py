"""Tiny models of every supported family, built from their config classes alone."""

from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

_TEXT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _TEXT | _IDS | {"num_key_value_heads": 1, "head_dim": 8}
_OPT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 50} | _IDS

# family: (config, how the path of the block stack ends)
FAMILIES: dict[str, tuple[Callable[[], tf.PretrainedConfig], str]] = {
    "bert": (lambda: tf.BertConfig(**_TEXT), "encoder.layer"),
    "roberta": (lambda: tf.RobertaConfig(**_TEXT | _IDS), "encoder.layer"),
    "distilbert": (
        lambda: tf.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=50),
        "transformer.layer",
    ),
    "electra": (lambda: tf.ElectraConfig(**_TEXT, embedding_size=8), "encoder.layer"),
    "deberta_v2": (
        lambda: tf.DebertaV2Config(
            **_TEXT,
            relative_attention=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            conv_kernel_size=3,
            pos_att_type=["p2c", "c2p"],
        ),
        "encoder.layer",
    ),
    "modernbert": (
        lambda: tf.ModernBertConfig(**_TEXT | _IDS, cls_token_id=1, sep_token_id=2, local_attention=8),
        ".layers",
    ),
    "gpt2": (lambda: tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, **_IDS), ".h"),
    "opt": (lambda: tf.OPTConfig(**_OPT), "decoder.layers"),
    "opt_projected": (lambda: tf.OPTConfig(**_OPT, word_embed_proj_dim=8), "decoder.layers"),
    "gpt_neox": (lambda: tf.GPTNeoXConfig(**_TEXT | _IDS), ".layers"),
    "llama": (lambda: tf.LlamaConfig(**_LLAMA), ".layers"),
    "llama_tied": (lambda: tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True), ".layers"),
    "mistral": (lambda: tf.MistralConfig(**_LLAMA), ".layers"),
    "qwen2": (lambda: tf.Qwen2Config(**_TEXT | _IDS, num_key_value_heads=1), ".layers"),
    "qwen3": (lambda: tf.Qwen3Config(**_LLAMA), ".layers"),
    "gemma": (lambda: tf.GemmaConfig(**_LLAMA), ".layers"),
    "phi": (lambda: tf.PhiConfig(**_TEXT | _IDS), ".layers"),
    "vit": (
        lambda: tf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        ),
        "vit.layers",
    ),
}

# Two stacks each, of 3 and 2 blocks.
ENCODER_DECODERS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "t5": lambda: tf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=50
    ),
    "bart": lambda: tf.BartConfig(
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=50,
        max_position_embeddings=32,
        **_IDS,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    ),
}

HEADS = {
    "sequence-classification": tf.AutoModelForSequenceClassification,
    "question-answering": tf.AutoModelForQuestionAnswering,
    "token-classification": tf.AutoModelForTokenClassification,
    "causal-lm": tf.AutoModelForCausalLM,
    "masked-lm": tf.AutoModelForMaskedLM,
    "seq2seq-lm": tf.AutoModelForSeq2SeqLM,
    "image-classification": tf.AutoModelForImageClassification,
}


def config_of(family: str) -> tf.PretrainedConfig:
    return ENCODER_DECODERS[family]() if family in ENCODER_DECODERS else FAMILIES[family][0]()


def heads_of(family: str) -> list[str]:
    """Every head that transformers has for the family."""
    config = config_of(family)
    heads = [head for head, auto in HEADS.items() if type(config) in auto._model_mapping]
    # Half of an encoder-decoder: one stack.
    halves = {"causal-lm", "token-classification"} if family in ENCODER_DECODERS else set()
    return [head for head in heads if head not in halves]


def build(family: str, head: str, *, device: str = "cpu") -> nn.Module:
    config = config_of(family)
    config.use_cache = False  # a cache among the outputs would be taken for a score
    torch.manual_seed(0)
    with torch.device(device):
        return HEADS[head].from_config(config, attn_implementation="eager").eval()


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A batch of 2 sequences of 6 tokens (or pictures of 8 x 8) that the model accepts."""
    kind = model.config.model_type
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.arange(3, 15).reshape(2, 6)
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # where the sequence classifiers look
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        batch["decoder_input_ids"] = ids
    return batch
