"""Turns conversations into token ids and labels that are answers only. Imports transformers; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from progtuning_ds.errors import ConfigError

IGNORED = -100
"""Label of a token that is not learnt, as torch's cross-entropy has it."""

Message = Mapping[str, str]


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ConfigError if the tokenizer has no chat template, or cannot say where its tokens lie in a text."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "task.messages_column needs a tokenizer with a chat template, which this one lacks; take an instruct "
            "model's, or give task.text_column"
        )
    if not tokenizer.is_fast:
        raise ConfigError("task.messages_column needs a fast tokenizer, which says where its tokens lie in a text")


def check_messages(messages: Any, where: str) -> None:
    """Raise a ConfigError if a row holds no conversation with an answer in it.

    Args:
        messages: the row's value.
        where: what to call it in a message.
    """
    good = isinstance(messages, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not good:
        raise ConfigError(f"task.messages_column must hold lists of {{role, content}}, got something else in {where}")
    if not any(one["role"] == "assistant" for one in messages):
        raise ConfigError(f"task.messages_column: no message of role assistant in {where}, so nothing to learn")


def answer_spans(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find its answers in it: what the template adds for an assistant turn after its cue.

    Returns:
        The text, and start and end of each answer in characters, end markers included.

    Raises:
        ConfigError: if the template rewrites earlier turns, so that answers cannot be told from the rest.
    """
    text = _render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        cue = _render(tokenizer, messages[:index], cue=True)
        turn = _render(tokenizer, messages[: index + 1])
        if not turn.startswith(cue) or not text.startswith(turn):
            raise ConfigError(
                "task.messages_column: the chat template changes earlier messages when later ones follow, so answers "
                "cannot be told from the rest; render the text yourself and give task.text_column"
            )
        spans.append((len(cue), len(turn)))
    return text, spans


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return token ids of a conversation and, for each, its label: itself within an answer, else IGNORED."""
    text, spans = answer_spans(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(begin <= start and end <= stop and start < end for begin, stop in spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, cue: bool = False) -> str:
    if not messages and not cue:
        return ""
    return str(
        tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, add_generation_prompt=cue)
    )
