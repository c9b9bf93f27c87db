"""Models of real size without memory: shapes and dispatch as on the CPU, no data (torch's fake tensors)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers as tf
from torch._subclasses.fake_tensor import FakeTensorMode

from progtuning_ds.train.tensor_bytes import TensorBytes

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_base(**changes: Any) -> torch.nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**changes))


def gpt2(**changes: Any) -> torch.nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(use_cache=False, **changes))


def llama(**changes: Any) -> torch.nn.Module:
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    }
    return tf.LlamaForCausalLM(tf.LlamaConfig(use_cache=False, **{**sizes, **changes}))


MODELS: dict[str, Callable[..., torch.nn.Module]] = {"bert-base": bert_base, "gpt2": gpt2, "llama": llama}


def fake_model(
    name: str, dtype: torch.dtype, attention: str, checkpointing: bool, **changes: Any
) -> tuple[FakeTensorMode, torch.nn.Module]:
    mode = FakeTensorMode()
    with mode:
        torch.set_default_dtype(dtype)
        try:
            model = MODELS[name](attn_implementation=attention, **changes).train()
        finally:
            torch.set_default_dtype(torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return mode, model


def peak_of_a_pass(mode: FakeTensorMode, model: torch.nn.Module, rows: int, seq_len: int) -> tuple[int, int]:
    """Bytes kept after forward, and the peak of forward and backward; gradients of weights go as they come."""
    with mode:
        ids = torch.zeros((rows, seq_len), dtype=torch.long)
        labels = ids if "LM" in type(model).__name__ else torch.zeros(rows, dtype=torch.long)
        drop_gradients(model.parameters())
        live = TensorBytes()
        live.ignore(model.parameters())
        with live:
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            kept = live.now
            loss.backward()
    return kept, live.peak


def drop_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
