"""Scores over 1, 2 and 4 ranks are those of other people's code on one process, with rows that do not divide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from seqeval import metrics as seqeval
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torchmetrics.functional.text import squad as torchmetrics_squad

from progtuning_ds.config import run_config
from progtuning_ds.tasks import build_task
from progtuning_ds.train import models
from tests.ranks import RankPools
from tests.tasks.test_glue import official
from tests.tasks.test_squad import made
from tests.tasks.test_squad import official as official_squad
from tests.train import tiny

ROWS = 37
TAGS = ("O", "B-GOOD", "I-GOOD", "B-BAD")


def built(given: dict[str, Any]) -> tuple[Any, Any]:
    """The task, and a model with weights drawn alike everywhere, large enough that it says this and that."""
    config = run_config(given)
    shape = models.load_shape(config.model)
    task = build_task(config, models.load_tokenizer(config.model, shape), 32)
    shape.update(task.model_settings)
    torch.manual_seed(3)
    model = task.auto_class.from_config(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return task, model


def score(given: dict[str, Any]) -> tuple[dict[str, float], list[Any]]:
    """What this rank says of the validation rows."""
    import torch.distributed as dist

    from progtuning_ds.train.evaluate import evaluate
    from progtuning_ds.train.ranks import Ranks

    task, model = built(given)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    return evaluate(task, model, task.evaluations["validation"], ranks, batch_size=3)


def settings(folder: Path, kind: str) -> dict[str, Any]:
    model = {"path": str(tiny.save_model(folder / "model", layers=1))}
    data = {"train_file": str(folder / "rows.jsonl"), "validation_file": str(folder / "rows.jsonl")}
    task: dict[str, Any] = {"kind": kind}
    if kind == "glue":
        return {
            "model": model,
            "data": {"source": str(official(folder / "glue", "mrpc", ROWS))},
            "task": {**task, "name": "mrpc"},
        }
    if kind == "squad":
        file = str(official_squad(folder / "squad.json", made(ROWS, 7)))
        return {"model": model, "data": {"train_file": file, "validation_file": file}, "task": {**task, "stride": 4}}
    rows: list[dict[str, Any]] = tiny.rows(ROWS, seed=7)
    if kind == "token_classification":
        rows = [
            {"tokens": row["text"].split(), "ner_tags": [TAGS[len(w) % 4] for w in row["text"].split()]} for row in rows
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": model, "data": data, "task": task}


def tokenizer_columns(row: dict[str, Any]) -> list[str]:
    return [key for key in ("input_ids", "token_type_ids", "attention_mask") if key in row]


def expected(kind: str, given: dict[str, Any]) -> dict[str, float]:
    """Rows one by one through the bare model; scikit-learn, seqeval and torchmetrics' SQuAD on what it says."""
    task, model = built(given)
    rows = task.evaluations["validation"].rows
    said = []
    with torch.no_grad():
        for row in rows:
            said.append(model(**{key: torch.tensor([row[key]]) for key in tokenizer_columns(row)}))
    if kind == "token_classification":
        starts = [[at for at, label in enumerate(row["labels"]) if label >= 0] for row in rows]
        got = [
            [task.names[one.logits[0, at].argmax()] for at in places] for one, places in zip(said, starts, strict=True)
        ]
        gold = [[task.names[tag] for tag in row["gold"]] for row in rows]
        return {
            "f1": seqeval.f1_score(gold, got),
            "precision": seqeval.precision_score(gold, got),
            "recall": seqeval.recall_score(gold, got),
            "accuracy": seqeval.accuracy_score(gold, got),
        }
    predicted, labels = [int(one.logits.argmax()) for one in said], list(rows["labels"])
    if kind == "glue":
        return {"f1": f1_score(labels, predicted), "accuracy": accuracy_score(labels, predicted)}
    return {
        "accuracy": accuracy_score(labels, predicted),
        "f1_macro": f1_score(labels, predicted, average="macro"),
        "matthews": matthews_corrcoef(labels, predicted),
    }


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["classification", "glue", "token_classification"])
def test_scores_are_those_of_one_process(ranks: RankPools, tmp_path: Path, kind: str, world_size: int) -> None:
    given = settings(tmp_path, kind)
    told = ranks(world_size).run(score, given=given)
    wanted = expected(kind, given)
    for metrics, predictions in told:
        assert len(predictions) == ROWS
        assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-14)
        assert metrics == told[0][0]
    assert 0.05 < wanted["accuracy"] < 0.95, "a model that is always right, or never, proves little"


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_answers_are_scored_as_by_one_process(ranks: RankPools, tmp_path: Path, world_size: int) -> None:
    given = settings(tmp_path, "squad")
    told = ranks(world_size).run(score, given=given)
    task, model = built(given)
    pieces = task.evaluations["validation"].rows
    assert len(pieces) > ROWS, "some contexts are in several pieces"
    with torch.no_grad():
        alone = task.answers([task.predict(model, task.collate([row]))[0] for row in pieces])
    for metrics, predictions in told:
        answers = task.answers(predictions)
        assert len(answers) == ROWS
        assert {name: one.text for name, one in answers.items()} == {name: one.text for name, one in alone.items()}
        theirs = torchmetrics_squad(
            [{"id": name, "prediction_text": one.text} for name, one in answers.items()],
            [
                {"id": one.id, "answers": {"text": list(one.golds), "answer_start": [0] * len(one.golds)}}
                for one in task.questions
            ],
        )
        assert metrics["f1"] == pytest.approx(float(theirs["f1"]), rel=1e-6)
        assert metrics["exact"] == pytest.approx(float(theirs["exact_match"]), rel=1e-6)
        assert metrics == told[0][0]
    assert 0 < told[0][0]["f1"] < 100
