"""Token classification: tags on first tokens, every word scored once, entity scores against a count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.tokens import IGNORED, TagsPrediction, TokenTask
from progtuning_ds.train.records import EvaluationRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import train

NAMES = ["O", "B-GOOD", "I-GOOD", "B-BAD", "I-BAD"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tokens") / "model", layers=2)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def rows(count: int, seed: int) -> dict[str, list]:
    """Good and bad words are entities; a second one in a row continues the first."""
    words = [row["text"].split() for row in tiny.rows(count, seed)]
    tags = []
    for row in words:
        kinds = ["GOOD" if word in tiny.GOOD else "BAD" if word in tiny.BAD else None for word in row]
        before = [None, *kinds[:-1]]
        tags.append(
            [
                "O" if kind is None else f"{'I' if kind == old else 'B'}-{kind}"
                for kind, old in zip(kinds, before, strict=True)
            ]
        )
    return {"tokens": words, "ner_tags": tags}


def saved(folder: Path, train: dict, validation: dict, features: Features | None = None) -> str:
    DatasetDict(
        train=Dataset.from_dict(train, features=features), validation=Dataset.from_dict(validation, features=features)
    ).save_to_disk(folder / "data")
    return str(folder / "data")


def built(source: str, tokenizer: PreTrainedTokenizerBase, **task: Any) -> TokenTask:
    config = run_config({"data": {"source": source}, "task": {"kind": "token_classification", **task}})
    return TokenTask.build(config, tokenizer, max_positions=32)


def test_the_first_token_of_a_word_carries_its_tag(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = {"tokens": [["a", "good-bad", "plot"]], "ner_tags": [["O", "B-GOOD", "O"]]}  # good-bad: three tokens
    task = built(saved(tmp_path, data, data), tokenizer)
    assert task.names == ("O", "B-GOOD")
    assert task.train.rows["labels"][0] == [IGNORED, 0, 1, IGNORED, IGNORED, 0, IGNORED]


def test_names_of_a_class_label_keep_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    features = Features(tokens=List(Value("string")), ner_tags=List(ClassLabel(names=NAMES)))
    data = {"tokens": [["a", "good"]], "ner_tags": [[0, 1]]}
    task = built(saved(tmp_path, data, data, features), tokenizer)
    assert task.names == tuple(NAMES)
    assert task.train.rows["gold"][0] == [0, 1]


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities as conlleval finds them: I- goes on only what has its kind."""
    found, start = set(), None
    for index, tag in enumerate([*tags, "O"]):
        kind = tag[2:]
        if start is not None and not (tag.startswith("I-") and kind == tags[start][2:]):
            found.add((start, index, tags[start][2:]))
            start = None
        if tag != "O" and start is None:
            start = index
    return found


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1), min_size=1, max_size=6)
)
def test_scores_count_whole_entities(data: list[list[tuple[str, str]]]) -> None:
    pairs = [tuple(zip(*row, strict=True)) for row in data]
    predictions = [TagsPrediction(said, gold, 0.0, len(gold)) for said, gold in pairs]
    task = TokenTask.__new__(TokenTask)
    scores = task.metrics(predictions)
    said = {(row, *one) for row, (tags, _) in enumerate(pairs) for one in entities(list(tags))}
    gold = {(row, *one) for row, (_, tags) in enumerate(pairs) for one in entities(list(tags))}
    right = len(said & gold)
    assert scores["precision"] == pytest.approx(right / len(said) if said else 0)
    assert scores["recall"] == pytest.approx(right / len(gold) if gold else 0)
    both = len(said) + len(gold)
    assert scores["f1"] == pytest.approx(2 * right / both if both and right else 0)


@pytest.mark.parametrize(
    ("validation", "task", "words"),
    [
        ({"tokens": [["a"]], "ner_tags": [["B-GOD"]]}, {}, "got 'B-GOD'; did you mean 'B-GOOD'?"),
        ({"tokens": [["a", "b"]], "ner_tags": [["O"]]}, {}, "as many tags as words, one at least, got 2 words and 1"),
        ({"tokens": [["a"]], "ner_tags": [["O"]]}, {"words_column": "token"}, "did you mean 'tokens'?"),
        ({"tokens": ["a good film"], "ner_tags": [["O"]]}, {}, "'tokens' must hold a list per row"),
        ({"tokens": [["a", "\u200b"]], "ner_tags": [["O", "O"]]}, {}, "makes no token of"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, validation: dict, task: dict, words: str
) -> None:
    data = {"tokens": [["a", "good"]], "ner_tags": [["O", "B-GOOD"]]}
    for name, columns in (("train", data), ("validation", validation)):
        Dataset.from_dict(columns).to_json(tmp_path / f"{name}.jsonl")
    config = run_config(
        {
            "data": {
                "train_file": str(tmp_path / "train.jsonl"),
                "validation_file": str(tmp_path / "validation.jsonl"),
            },
            "task": {"kind": "token_classification", **task},
        }
    )
    with pytest.raises(ConfigError) as caught:
        TokenTask.build(config, tokenizer, max_positions=32)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_behind_the_limit_count_and_scores_do_not_depend_on_ranks(
    ranks: RankPools, tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = saved(tmp_path, rows(60, 1), rows(23, 2))
    scores = []
    for world_size in (1, 2):
        given_run = {
            "model": {"path": str(model_dir)},
            "data": {"source": source},
            "task": {"kind": "token_classification", "max_length": 10},
            "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2},
            "logging": {"progress": "off", "plot": False},
            "output_dir": str(tmp_path / f"run{world_size}"),
        }
        ranks(world_size).run(train, given=given_run)
        scores.append([record.metrics for record in read_records(tmp_path / f"run{world_size}", EvaluationRecord)])
    assert scores[0][-1] == pytest.approx(scores[1][-1], abs=1e-4)
    words = sum(map(len, rows(23, 2)["tokens"]))
    task = built(source, tokenizer, max_length=10)
    assert sum(len(gold) for gold in task.evaluations["validation"].rows["gold"]) == words
    assert sum(task.evaluations["validation"].rows["words"]) < words
    assert scores[0][-1]["accuracy"] == pytest.approx(round(scores[0][-1]["accuracy"] * words) / words)
