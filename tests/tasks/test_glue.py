"""GLUE: official files of all nine tasks, scores against scikit-learn and scipy, submissions, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks import GlueTask
from progtuning_ds.tasks.glue.scores import official_scores
from progtuning_ds.tasks.glue.specs import SPECS
from progtuning_ds.tasks.glue.submission import write_submission
from progtuning_ds.train.records import EvaluationRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import train

# Headers of the official download, and the labels in its files; None where a file has no header line.
OFFICIAL: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "cola": (None, "index sentence", ("0", "1")),
    "sst2": ("sentence label", "index sentence", ("0", "1")),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", "index|#1 ID|#2 ID|#1 String|#2 String", ("0", "1")),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
        ("0.000", "5.000", "3.250"),
    ),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2", ("0", "1")),
    "mnli": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2 label1 gold_label",
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2",
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": ("index question sentence label", "index question sentence", ("entailment", "not_entailment")),
    "rte": ("index sentence1 sentence2 label", "index sentence1 sentence2", ("entailment", "not_entailment")),
    "wnli": ("index sentence1 sentence2 label", "index sentence1 sentence2", ("0", "1")),
}
EXPECTED = {
    "stsb": [0.0, 5.0, 3.25],
    "mnli": [0, 1, 2],
    **{name: [0, 1, 0] for name in ("cola", "sst2", "mrpc", "qqp", "wnli", "qnli", "rte")},
}
TEXTS = {"sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String"}


def official(folder: Path, name: str, rows: int = 3) -> Path:
    """Write a task's files as the official download has them; a quotation mark in a text is one."""
    labelled, unlabelled, labels = OFFICIAL[name]
    split = (lambda text: text.split("|")) if name == "mrpc" else str.split
    columns = ["source", "label", "mark", "sentence"] if labelled is None else split(labelled)
    folder.mkdir(parents=True)
    parts = ["train", "dev", "test"]
    if name == "mnli":
        parts = ["train", *(f"{part}_{kind}" for part in ("dev", "test") for kind in ("matched", "mismatched"))]
    for part in parts:
        is_test = part.startswith("test")
        header = split(unlabelled) if is_test else columns
        lines = [] if labelled is None and not is_test else ["\t".join(header)]
        for row in range(rows):
            values = []
            for column in header:
                is_label = column in ("label", "score", "is_duplicate", "Quality", "gold_label")
                text = f'a "good film {row}' if row % 2 else f"the bad plot {row}"
                values.append(labels[row % len(labels)] if is_label else text if column in TEXTS else str(row))
            lines.append("\t".join(values))
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("glue") / "model", layers=2)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def built(source: Path, tokenizer: PreTrainedTokenizerBase, name: str, **data: Any) -> GlueTask:
    config = run_config({"data": {"source": str(source), **data}, "task": {"kind": "glue", "name": name}})
    return GlueTask.build(config, tokenizer, max_positions=32)


def hub_like(folder: Path, name: str) -> Path:
    """A saved data set with the hub's columns, class names and -1 for unknown test labels."""
    spec = SPECS[name]
    label = Value("float32") if spec.is_regression else ClassLabel(names=list(spec.labels))
    features = Features({column: Value("string") for column in spec.texts} | {"label": label, "idx": Value("int32")})

    def rows(labels: list) -> Dataset:
        texts = {column: ["a good film"] * len(labels) for column in spec.texts}
        return Dataset.from_dict({**texts, "label": labels, "idx": range(len(labels))}, features=features)

    suffixes = ("_matched", "_mismatched") if name == "mnli" else ("",)
    splits = {"train": rows(EXPECTED[name])}
    splits |= {f"validation{suffix}": rows(EXPECTED[name]) for suffix in suffixes}
    splits |= {f"test{suffix}": rows([-1, -1, -1]) for suffix in suffixes}
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("written", [official, hub_like])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_task_reads_its_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, written: Any
) -> None:
    task = built(written(tmp_path / "data", name), tokenizer, name)
    kinds = {"validation", "validation_mismatched"} if name == "mnli" else {"validation"}
    assert set(task.evaluations) == kinds
    assert set(task.submissions) == set(SPECS[name].submission)
    for rows in (task.train, *task.evaluations.values()):
        assert rows.rows["labels"][:] == EXPECTED[name]
    assert all(len(rows.rows) == 3 for rows in task.submissions.values())
    pairs = [ids.count(tokenizer.sep_token_id) for ids in task.train.rows["input_ids"]]
    assert pairs == [len(SPECS[name].texts)] * 3
    assert task.model_settings["num_labels"] == max(len(SPECS[name].labels), 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_scores_of_classes_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (list(column) for column in zip(*pairs, strict=True))
    got = {}
    for name in ("cola", "mrpc"):
        got |= official_scores(SPECS[name], torch.tensor(predicted), torch.tensor(labels))
    assert got["accuracy"] == accuracy_score(labels, predicted)
    assert got["f1"] == pytest.approx(f1_score(labels, predicted, zero_division=0), rel=1e-14)
    assert got["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted), rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("rows", [7, 100])
def test_correlations_are_scipys_with_ties(rows: int) -> None:
    draw = np.random.default_rng(rows)
    labels = draw.integers(0, 26, rows) / 5
    predicted = labels + draw.normal(size=rows).round(1)
    got = official_scores(SPECS["stsb"], torch.tensor(predicted), torch.tensor(labels))
    assert got["pearson"] == pytest.approx(pearsonr(predicted, labels)[0], abs=1e-6)
    assert got["spearman"] == pytest.approx(spearmanr(predicted, labels)[0], abs=1e-6)
    constant = official_scores(SPECS["stsb"], torch.ones(rows), torch.tensor(labels))
    assert constant == {"spearman": 0.0, "pearson": 0.0}


def test_a_submission_is_what_the_server_takes(tmp_path: Path) -> None:
    written = write_submission(tmp_path, "test_mismatched", SPECS["mnli"], [0, 2])
    assert written.name == "MNLI-mm.tsv"
    assert written.read_text() == "index\tprediction\n0\tentailment\n1\tcontradiction\n"
    assert write_submission(tmp_path, "test", SPECS["cola"], [1]).read_text().endswith("\n0\t1\n")
    stsb = write_submission(tmp_path, "test", SPECS["stsb"], [5.25, -1.0, 2.5])
    assert stsb.read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n2\t2.500\n"


@pytest.mark.parametrize(
    ("name", "part", "old", "new", "words"),
    [
        ("sst2", "train", "\t1", "\t2", "label out of range in row 1 of split 'train'"),
        ("rte", "dev", "not_entailment", "maybe", "label out of range in line 3 of"),
        ("stsb", "dev", "5.000", "5.500", "must be 0 to 5, got 5.5"),
        ("qnli", "train", "question", "query", "must have a column 'question', got index, query"),
    ],
)
def test_what_is_wrong_with_the_files_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, part: str, old: str, new: str, words: str
) -> None:
    path = official(tmp_path / "data", name) / f"{part}.tsv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError) as caught:
        built(tmp_path / "data", tokenizer, name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_the_files_is_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"data\.source: .* holds no train\.tsv, and is no folder of save_to_disk"):
        built(tmp_path, tokenizer, "rte")


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_a_run_scores_and_submits_every_row_once(
    ranks: RankPools, tmp_path: Path, model_dir: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    official(tmp_path / "data", name, rows=11)
    files = {}
    for world_size in (1, 2):
        folder = tmp_path / f"run{world_size}"
        given = {
            "model": {"path": str(model_dir)},
            "data": {"source": str(tmp_path / "data")},
            "task": {"kind": "glue", "name": name},
            "train": {"epochs": 2, "global_batch_size": 4, "learning_rate": 1e-3},
            "logging": {"progress": "off", "plot": False},
            "output_dir": str(folder),
        }
        ranks(world_size).run(train, given=given)
        records = read_records(folder, EvaluationRecord)
        assert {record.split for record in records} == set(built(tmp_path / "data", tokenizer, name).evaluations)
        assert all(record.rows == 11 and set(SPECS[name].scores) < set(record.metrics) for record in records)
        files[world_size] = {path.name: path.read_text() for path in (folder / "submission").iterdir()}
    assert set(files[1]) == set(SPECS[name].submission.values())
    for file, text in files[1].items():
        lines = [line.split("\t") for line in text.splitlines()]
        assert [index for index, _ in lines[1:]] == [str(index) for index in range(11)]
        if name == "stsb":
            ours, others = (
                [float(line.split("\t")[1]) for line in one.splitlines()[1:]] for one in (text, files[2][file])
            )
            assert ours == pytest.approx(others, abs=2e-3)
        else:
            assert text == files[2][file]
