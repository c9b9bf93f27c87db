"""A random Llama of a few thousand parameters, its tokenizer with a chat template, and texts. Imports no deepspeed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(20)]
MARKS = ["<pad>", "<unk>", "</s>", "user:", "assistant:", "system:", "."]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(MARKS + WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    made.chat_template = template
    return made


def config(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": len(MARKS) + len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Words that follow each other in order, so that there is something to learn."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        start, length = draw.randrange(len(WORDS)), draw.randint(2, longest)
        made.append(" ".join(WORDS[(start + step) % len(WORDS)] for step in range(length)))
    return made
