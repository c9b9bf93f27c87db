"""Rows load from every kind of source, or one line says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from progtuning_ds.config import DataConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.sources import Splits, load_splits

ROWS = {"text": [f"row {number}" for number in range(20)], "label": [number % 2 for number in range(20)]}


def write(path: Path, rows: dict = ROWS) -> str:
    data = Dataset.from_dict(rows)
    suffix = path.suffix
    if suffix == ".parquet":
        data.to_parquet(path)
    elif suffix in (".json", ".jsonl"):
        data.to_json(path)
    else:
        data.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    return str(path)


def refusal(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_splits(DataConfig(**settings), seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path, suffix: str) -> None:
    files = {name: write(tmp_path / f"{name}{suffix}") for name in ("train_file", "validation_file", "test_file")}
    splits = load_splits(DataConfig(**files), seed=0)
    assert splits.test is not None
    for split in splits:
        assert split.rows["text"][:] == ROWS["text"]
        assert split.rows["label"][:] == ROWS["label"]


def test_a_saved_folder_loads_by_name(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_dict(ROWS), dev=Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "saved")
    splits = load_splits(DataConfig(source=str(tmp_path / "saved"), validation_split="dev"), seed=0)
    assert splits.evaluation.rows["text"][:] == ROWS["text"]
    said = refusal(source=str(tmp_path / "saved"))
    assert "nothing to evaluate on; set data.validation_split (one of train, dev)" in said
    said = refusal(source=str(tmp_path / "saved"), validation_split="devv")
    assert "data.validation_split must be one of train, dev, got 'devv'; did you mean 'dev'?" in said


def test_held_out_rows_are_disjoint_complete_and_drawn_with_the_seed(tmp_path: Path) -> None:
    data = DataConfig(train_file=write(tmp_path / "all.csv"), validation_fraction=0.25)

    def texts(splits: Splits) -> tuple[list[str], list[str]]:
        return splits.train.rows["text"][:], splits.evaluation.rows["text"][:]

    train, held_out = texts(load_splits(data, seed=0))
    assert len(held_out) == 5
    assert sorted(train + held_out) == sorted(ROWS["text"])
    assert (train, held_out) == texts(load_splits(data, seed=0))
    assert held_out != texts(load_splits(data, seed=1))[1]


def test_limits_draw_rows_with_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv")
    data = DataConfig(train_file=path, validation_file=path, max_train_samples=6, max_eval_samples=40)
    splits = load_splits(data, seed=0)
    drawn = splits.train.rows["text"][:]
    assert len(drawn) == len(set(drawn)) == 6
    assert drawn != ROWS["text"][:6], "the first rows of a file that is sorted by label would be of one class"
    assert len(splits.evaluation.rows) == 20


def test_only_an_empty_cell_of_a_csv_is_missing(tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text('text,label\nNone,NA\n"",null\n')
    path = str(tmp_path / "words.csv")
    rows = load_splits(DataConfig(train_file=path, validation_file=path), seed=0).train.rows
    assert rows["text"][:] == ["None", None]
    assert rows["label"][:] == ["NA", "null"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ragged.csv", "text,label\na,1\nb,2,3\n", "cannot read"),
        ("broken.json", "{nonsense", "cannot read"),
        ("nothing.csv", "", "cannot read"),
        ("header.csv", "text,label\n", "holds no rows"),
        ("text.txt", "a", "must be a file of type .csv, .tsv, .json, .jsonl, .parquet"),
    ],
)
def test_an_unreadable_file_is_one_line_with_its_name(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    said = refusal(train_file=str(tmp_path / name), validation_fraction=0.5)
    assert said.startswith("data.train_file")
    assert name in said
    assert words in said


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv")
    said = refusal(train_file=path, validation_file=str(tmp_path / "trian.csv"))
    assert said.startswith("data.validation_file: no file")
    assert "did you mean 'train.csv'?" in said


def test_files_without_anything_to_evaluate_on_are_refused(tmp_path: Path) -> None:
    assert "set data.validation_file or data.validation_fraction" in refusal(train_file=write(tmp_path / "a.csv"))


def test_a_source_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    said = refusal(source=str(tmp_path / "nowhere"))
    assert said.startswith("data.source: cannot load")
