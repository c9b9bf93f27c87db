"""Cuts question and context into overlapping pieces that a model can read. Imports transformers; no torch."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from progtuning_ds.config import SquadConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.base import EncodedRows
from progtuning_ds.tasks.sources import Split
from progtuning_ds.tasks.squad.rows import ANSWERS, CONTEXT, QUESTION

START, STOP, EXAMPLE, SPANS, NULL = "start_positions", "end_positions", "example", "spans", "null"
NOWHERE = (-1, -1)
"""Span of a token that is not of the context."""


def cut_pieces(
    split: Split, task: SquadConfig, tokenizer: PreTrainedTokenizerBase, limit: int, first_example: int = 0
) -> EncodedRows:
    """Return one row per piece of a context.

    Each has what the tokenizer gives; the first and last token of the first accepted answer, or of no answer where the
    piece does not hold it; the number of its question (from `first_example`); for each token the characters of the
    context that it stands for; and the token that stands for no answer.

    Raises:
        ConfigError: if a question leaves no room for a context.
    """
    right = tokenizer.padding_side == "right"

    def cut(questions: list[str], contexts: list[str], answers: list[Any], indices: list[int]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            *((questions, contexts) if right else (contexts, questions)),
            truncation="only_second" if right else "only_first",
            max_length=limit,
            stride=task.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        out: dict[str, list[Any]] = {name: [] for name in (START, STOP, EXAMPLE, SPANS, NULL)}
        for piece, owner in enumerate(owners):
            sequence = encoded.sequence_ids(piece)
            of_context = [one == (1 if right else 0) for one in sequence]
            spans = [span if inside else NOWHERE for span, inside in zip(offsets[piece], of_context, strict=True)]
            null = _null_token(encoded["input_ids"][piece], tokenizer)
            begin, end = _answer_tokens(answers[owner], spans) or (null, null)
            for name, value in ((START, begin), (STOP, end), (SPANS, spans), (NULL, null)):
                out[name].append(value)
            out[EXAMPLE].append(first_example + indices[owner])
        return {**encoded, **out}

    columns = [QUESTION, CONTEXT, ANSWERS]
    try:
        rows = split.rows.select_columns(columns).map(
            cut,
            batched=True,
            with_indices=True,
            input_columns=columns,
            remove_columns=columns,
            desc=f"tokenizing {split.name}",
        )
    except BaseException as error:
        if type(error).__name__ == "PanicException" or "truncat" in str(error).lower():
            raise ConfigError(
                f"task.max_length {limit} leaves no room for question, context and a stride of {task.stride} in "
                f"{split.name}; use a larger one, or a smaller task.stride"
            ) from error
        raise
    return EncodedRows(rows, [len(ids) for ids in rows["input_ids"]])


def _null_token(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _answer_tokens(answers: dict[str, list[Any]], spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token of the first accepted answer, or None where the piece does not hold all of it."""
    if not answers["text"]:
        return None
    start = answers["answer_start"][0]
    stop = start + len(answers["text"][0])
    inside = [token for token, (begin, end) in enumerate(spans) if begin < stop and end > start and begin >= 0]
    held = [spans[token] for token in inside if spans[token][1] > spans[token][0]]
    if not held or held[0][0] > start or held[-1][1] < stop:
        return None
    return inside[0], inside[-1]
