"""Loads SQuAD's rows: from the hub, a saved folder, the official JSON, or one's own files. No torch, no deepspeed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from progtuning_ds.config import DataConfig, SquadConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.columns import require_column, require_text
from progtuning_ds.tasks.sources import Split, Splits, load_splits

ID, QUESTION, CONTEXT, ANSWERS = "id", "question", "context", "answers"


def load_rows(data: DataConfig, task: SquadConfig, seed: int) -> Splits:
    """Load rows with the hub's columns: id, question, context, answers {text, answer_start}.

    Args:
        data: any source; files that end in `.json` may be the official ones. Without any, the hub's SQuAD.
        task: which version.
        seed: seed of the draw where rows are held out or limited.

    Raises:
        ConfigError: if something is missing, or is no SQuAD.
    """
    if data.source is None and data.train_file is None:
        data = replace(data, source="rajpurkar/squad_v2" if task.unanswerable else "rajpurkar/squad")
    splits = load_splits(data, seed, read=_read_official)
    for split in splits:
        _check(split, task)
    return splits


def _read_official(path: Path) -> Dataset | None:
    """Flatten a file of the official form, {data: [{paragraphs: [{context, qas}]}]}; None for any other file."""
    if path.suffix != ".json":
        return None
    with path.open(encoding="utf-8") as file:
        begin = file.read(1)
        if begin != "{":
            return None
        try:
            content = json.loads(begin + file.read())
        except json.JSONDecodeError:
            return None  # one record a line
    if not isinstance(content.get("data"), list):
        return None
    rows: list[dict[str, Any]] = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                rows += [_question(paragraph["context"], one) for one in paragraph["qas"]]
    except KeyError as error:
        raise ConfigError(
            f"data (squad): {str(path)!r} is no SQuAD: {error} is missing behind question {len(rows)}"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"data (squad): {str(path)!r} is no SQuAD behind question {len(rows)}: {error}") from error
    return Dataset.from_list(rows)


def _question(context: str, one: dict[str, Any]) -> dict[str, Any]:
    answers = [] if one.get("is_impossible") else one.get("answers", [])
    return {
        ID: str(one["id"]),
        QUESTION: one["question"],
        CONTEXT: context,
        ANSWERS: {
            "text": [str(answer["text"]) for answer in answers],
            "answer_start": [int(answer["answer_start"]) for answer in answers],
        },
    }


def _check(split: Split, task: SquadConfig) -> None:
    for column in (QUESTION, CONTEXT):
        require_text(split, column, "data (squad)")
    for column in (ID, ANSWERS):
        require_column(split, column, "data (squad)")
    both = zip(split.rows[ANSWERS], split.rows[CONTEXT], strict=True)
    for row, (answers, context) in enumerate(both):
        where = f"row {row} of {split.name}"
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
            raise ConfigError(f"data (squad): 'answers' must hold {{text, answer_start}} in {where}")
        if not answers["text"] and not task.unanswerable:
            raise ConfigError(f"data (squad): no answer in {where}; set task.unanswerable=true for SQuAD v2.0")
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if not 0 <= start < len(context) or not text:
                raise ConfigError(f"data (squad): answer {text!r} at {start} lies outside the context in {where}")
