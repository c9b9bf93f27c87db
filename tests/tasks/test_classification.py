"""Classification: labels, encoding, batches, and metrics against an independent library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks import ClassificationTask, EncodedRows
from progtuning_ds.tasks.classification import RowPrediction
from progtuning_ds.tasks.labels import LabelMap
from tests.train import tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def save(folder: Path, features: Features | None = None, **splits: dict[str, list]) -> str:
    from datasets import DatasetDict

    data = {name: Dataset.from_dict(columns, features=features) for name, columns in splits.items()}
    DatasetDict(data).save_to_disk(folder / "data")
    return str(folder / "data")


def built(
    source: str, tokenizer: PreTrainedTokenizerBase, model: dict | None = None, **task: Any
) -> ClassificationTask:
    config = run_config({"data": {"source": source}, "task": task, "model": model or {}})
    return ClassificationTask.build(config, tokenizer, max_positions=32)


def refusal(source: str, tokenizer: PreTrainedTokenizerBase, model: dict | None = None, **task: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        built(source, tokenizer, model, **task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def columns(labels: list, texts: list | None = None) -> dict[str, list]:
    return {"text": texts or ["a good film"] * len(labels), "label": labels}


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["neg", "pos", "neg", "mid"], ("mid", "neg", "pos"), [1, 2, 1, 0]),
        ([5, 1, 3, 1], ("1", "3", "5"), [2, 0, 1, 0]),
        ([True, False, True], ("0", "1"), [1, 0, 1]),
        ([1.0, 0.0, 2.0], ("0", "1", "2"), [1, 0, 2]),
    ],
)
def test_labels_are_sorted_and_numbered(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, labels: list, names: tuple, indices: list
) -> None:
    task = built(save(tmp_path, train=columns(labels), validation=columns(labels[:1])), tokenizer)
    assert task.labels.names == names
    assert task.train.rows["labels"][:] == indices
    assert task.model_settings["id2label"] == dict(enumerate(names))
    assert task.model_settings["num_labels"] == len(names)


def test_names_of_a_class_label_feature_keep_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["z", "a", "m"]))
    source = save(tmp_path, features, train=columns([2, 0]), validation=columns([1]))
    assert built(source, tokenizer).labels.names == ("z", "a", "m")


def test_integer_labels_follow_num_labels_where_it_is_given(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = save(tmp_path, train=columns([0, 2]), validation=columns([1]))
    assert built(source, tokenizer, {"num_labels": 4}).labels.names == ("0", "1", "2", "3")
    assert "label out of range in row 1 of split 'train'" in refusal(source, tokenizer, {"num_labels": 2})
    assert "got 2" in refusal(source, tokenizer, {"num_labels": 2})


@pytest.mark.parametrize(
    ("train", "validation", "task", "words"),
    [
        (columns([0, 1]), columns([2]), {}, "label out of range in row 0 of split 'validation'"),
        (columns(["yes", "no"]), columns(["yess"]), {}, "got 'yess'; did you mean 'yes'?"),
        (columns([0, 1]), columns([0, None]), {}, "row 1 of split 'validation' of"),
        (columns([0, 0]), columns([0]), {}, "must hold at least two classes, got 0"),
        (columns([0.5, 1.5]), columns([0.5]), {}, "must hold class names or integers, got"),
        (columns([[0], [1]]), columns([[0]]), {}, "must hold one value per row"),
        (columns([0, 1]), columns([0]), {"label_column": "lable"}, "got 'lable'; did you mean 'label'?"),
        (columns([0, 1]), columns([0]), {"text_column": "texts"}, "got 'texts'; did you mean 'text'?"),
        (columns([0, 1]), columns([0]), {"pair_column": "text2"}, "task.pair_column must be one of text, label"),
        (columns([0, 1]), columns([0]), {"text_column": "label"}, "must hold text in split 'train'"),
        (columns([0, 1], ["a", None]), columns([0]), {}, "is missing in 1 of split 'train'"),
        (columns([0, 1]), columns([]), {}, "holds no rows"),
        (columns([0, 1]), columns([0]), {"max_length": 33}, "task.max_length must be at most 32"),
        (columns([0, 1]), columns([0]), {"max_length": 3}, "task.max_length must be above 3"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, train: dict, validation: dict, task: dict, words: str
) -> None:
    assert words in refusal(save(tmp_path, train=train, validation=validation), tokenizer, **task)


def test_names_must_be_as_many_as_num_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = save(tmp_path, train=columns(["a", "b", "c"]), validation=columns(["a"]))
    said = refusal(source, tokenizer, {"num_labels": 2})
    assert "model.num_labels is 2 but 'label' has 3 classes" in said


def test_long_texts_are_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["film " * 3, "film " * 60]
    source = save(tmp_path, train=columns([0, 1], texts), validation=columns([0]))
    assert built(source, tokenizer).train.lengths == [5, 32]
    task = built(source, tokenizer, max_length=8)
    assert task.train.lengths == [5, 8]
    assert "1 training rows reach task.max_length 8" in task.notes[1]


def test_pairs_are_two_segments(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = {**columns([0, 1], ["good film", "bad"]), "other": ["the plot", "a"]}
    task = built(save(tmp_path, train=rows, validation=rows), tokenizer, pair_column="other")
    tokens = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in task.train.rows]
    assert tokens[0] == ["[CLS]", "good", "film", "[SEP]", "the", "plot", "[SEP]"]
    assert task.train.rows[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["good", "a very good film", "the film was very very bad"]
    task = built(save(tmp_path, train=columns([1, 1, 0], texts), validation=columns([0])), tokenizer)
    batch = task.collate([task.train.rows[index] for index in (0, 1)])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert batch["labels"].tolist() == [1, 1]
    assert batch["input_ids"][0, 3:].eq(tokenizer.pad_token_id).all()


def scorer(tokenizer: Any, classes: int) -> ClassificationTask:
    names = tuple(str(index) for index in range(classes))
    nothing = EncodedRows(Dataset.from_dict({}), [])
    return ClassificationTask(tokenizer, LabelMap(names, names), nothing, {})


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
)
def test_metrics_are_scikit_learns(rows: list[tuple[int, int]]) -> None:
    predicted, labels = map(np.array, zip(*rows, strict=True))
    got = scorer(None, 4).metrics([RowPrediction(int(p), int(t), 0.5) for p, t in rows])
    assert got["accuracy"] == accuracy_score(labels, predicted)
    # scikit-learn too averages over the classes that occur in either.
    assert got["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"), rel=1e-14)
    assert got["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted), rel=1e-14, abs=1e-15)
    assert got["loss"] == pytest.approx(0.5)


class Logits(nn.Module):
    """Answers with fixed logits, as a model of transformers would."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self


def test_loss_and_predictions_are_those_of_the_logits() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0], [1.0, 1.5, 0.0]])
    labels = torch.tensor([0, 0, 1])
    task = scorer(None, 3)
    batch = {"input_ids": torch.zeros(3, 1, dtype=torch.long), "labels": labels}
    expected = log_loss(labels.numpy(), logits.softmax(-1).numpy(), labels=[0, 1, 2])
    assert task.loss(Logits(logits), batch).item() == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        rows = task.predict(Logits(logits), batch)
    assert [row.predicted for row in rows] == [0, 2, 1]
    assert [row.label for row in rows] == [0, 0, 1]
    assert task.metrics(rows)["loss"] == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_a_bf16_model_is_computed_in_fp32() -> None:
    logits = torch.tensor([[10.0, 10.0 + 1 / 8]], dtype=torch.bfloat16)
    batch = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "labels": torch.tensor([0])}
    loss = scorer(None, 2).loss(Logits(logits), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(1 / 8)).item(), abs=1e-6)
