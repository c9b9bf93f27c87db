"""SQuAD: official files, pieces, answers, and scores against torchmetrics and a search over all thresholds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional.text import squad as torchmetrics_squad
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks import SquadTask
from progtuning_ds.tasks.squad.scores import Answered, exact, f1, score
from progtuning_ds.train.records import EvaluationRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import train


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("squad") / "model", layers=2)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def question(context: str, answer: str | None, name: str = "q") -> dict[str, Any]:
    """One question; the second accepted answer is longer by a word."""
    answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
    return {"id": name, "question": "very good", "answers": answers, "is_impossible": answer is None}


def official(path: Path, paragraphs: list[tuple[str, list[dict[str, Any]]]]) -> Path:
    data = [{"title": "t", "paragraphs": [{"context": context, "qas": questions} for context, questions in paragraphs]}]
    path.write_text(json.dumps({"version": "v2.0", "data": data}, indent=1))
    return path


def made(count: int, seed: int, unanswerable: bool = False) -> list[tuple[str, list[dict[str, Any]]]]:
    """The answer is the only good word; where there is none, there is no answer."""
    draw = random.Random(seed)
    paragraphs = []
    for index in range(count):
        words = draw.choices(tiny.FILLER, k=draw.randint(4, 30))
        answer = None if unanswerable and index % 3 == 0 else draw.choice(tiny.GOOD)
        if answer:
            words[draw.randrange(len(words))] = answer
        context = " ".join(words)
        paragraphs.append((context, [question(context, answer, f"q{seed}-{index}")]))
    return paragraphs


def built(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, paragraphs: list[tuple[str, list[dict[str, Any]]]], **task: Any
) -> SquadTask:
    file = str(official(tmp_path / "data.json", paragraphs))
    settings = {"kind": "squad", "max_length": 20, "stride": 4, **task}
    config = run_config({"data": {"train_file": file, "validation_file": file}, "task": settings})
    return SquadTask.build(config, tokenizer, max_positions=32)


def test_pieces_hold_the_whole_context_and_point_at_the_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = built(tmp_path, tokenizer, made(12, 1, unanswerable=True), unanswerable=True)
    rows = task.evaluations["validation"].rows
    assert len(rows) > 12, "long contexts make several pieces"
    found: dict[int, set[str]] = {}
    covered: dict[int, set[int]] = {}
    for row in rows:
        context = task.questions[row["example"]].context
        spans = [span for span in row["spans"] if span[0] >= 0]
        covered.setdefault(row["example"], set()).update(at for begin, end in spans for at in range(begin, end))
        start, stop = row["start_positions"], row["end_positions"]
        if start == row["null"]:
            assert stop == start
            assert tokenizer.convert_ids_to_tokens(row["input_ids"][start]) == "[CLS]"
        else:
            text = context[row["spans"][start][0] : row["spans"][stop][1]]
            found.setdefault(row["example"], set()).add(text)
    for example, one in enumerate(task.questions):
        assert found.get(example, set()) == set(one.golds)
        assert covered[example] == {at for at, letter in enumerate(one.context) if letter != " "}


class Oracle(nn.Module):
    """Logits of a model that knows where the right tokens are."""

    def __init__(self, ids: list[int], null_logit: float) -> None:
        super().__init__()
        self.ids, self.null_logit = ids, null_logit

    def forward(self, input_ids: torch.Tensor, **_: Any) -> QuestionAnsweringModelOutput:
        logits = torch.isin(input_ids, torch.tensor(self.ids)).float() * 5
        logits[:, :3] = 9.0  # the question's words, which are no answer however sure
        logits[:, 0] = self.null_logit
        return QuestionAnsweringModelOutput(start_logits=logits, end_logits=logits)


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_found_across_pieces(tmp_path: Path, model_dir: Path, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    task = built(tmp_path, tokenizer, made(9, 2, unanswerable=True), unanswerable=True)
    task.tokenizer.padding_side = side
    rows = task.evaluations["validation"].rows
    good = tokenizer.convert_tokens_to_ids(list(tiny.GOOD))

    class Sided(Oracle):
        def forward(self, input_ids: torch.Tensor, **more: Any) -> QuestionAnsweringModelOutput:
            if side == "left":  # the same logits, behind the padding
                shift = (more["attention_mask"] == 0).sum(1).tolist()
                outputs = [super(Sided, self).forward(row[by:][None]) for row, by in zip(input_ids, shift, strict=True)]
                padded = [
                    torch.cat([torch.zeros(by), out.start_logits[0]]) for by, out in zip(shift, outputs, strict=True)
                ]
                return QuestionAnsweringModelOutput(start_logits=torch.stack(padded), end_logits=torch.stack(padded))
            return super().forward(input_ids)

    batch = task.collate([rows[index] for index in range(len(rows))])
    predictions = task.predict(Sided(good, 2.0), batch)
    metrics = task.metrics(predictions)
    assert metrics["exact"] == metrics["f1"] == metrics["has_answer_exact"] == metrics["no_answer_exact"] == 100
    always = task.metrics(task.predict(Sided(good, -9.0), batch))
    assert always["has_answer_f1"] == 100
    assert always["no_answer_f1"] == 0
    assert always["best_f1"] >= always["f1"]


WORDS = st.lists(st.sampled_from(["the", "Denver", "Broncos", "a", "2016,", "St.-Denis", "won"]), max_size=5)
TEXT = WORDS.map(" ".join)


@given(
    st.lists(st.tuples(st.lists(TEXT.filter(lambda t: exact("", t) == 0), min_size=1, max_size=3), TEXT), min_size=1)
)
def test_scores_of_version_one_are_torchmetrics(questions: list[tuple[list[str], str]]) -> None:
    ours = score([Answered(tuple(golds), said) for golds, said in questions])
    theirs = torchmetrics_squad(
        [{"id": str(index), "prediction_text": said} for index, (_, said) in enumerate(questions)],
        [
            {"id": str(index), "answers": {"text": golds, "answer_start": [0] * len(golds)}}
            for index, (golds, _) in enumerate(questions)
        ],
    )
    assert ours["exact"] == pytest.approx(theirs["exact_match"].item(), abs=1e-3)
    assert ours["f1"] == pytest.approx(theirs["f1"].item(), abs=1e-3)


@pytest.mark.parametrize(
    ("gold", "said", "is_exact", "overlap"),
    [
        ("Denver Broncos", "The Denver Broncos!", 1, 1),
        ("Santa Clara, California", "Levi's Stadium in Santa Clara, California", 0, 2 * 3 / 9),
        ("gold", "", 0, 0),
        ("", "", 1, 1),
        ("", "gold", 0, 0),
    ],
)
def test_examples_worked_out_by_hand(gold: str, said: str, is_exact: float, overlap: float) -> None:
    assert exact(gold, said) == is_exact
    assert f1(gold, said) == pytest.approx(overlap)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([(), ("one",), ("two words",)]), st.sampled_from(["one", "words", ""]), st.integers(-3, 3)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_best_threshold_is_the_best_of_all(data: list[tuple[tuple[str, ...], str, int]]) -> None:
    questions = [Answered(golds, said, float(margin)) for golds, said, margin in data]
    found = score(questions, 0.0)
    tried = [score(questions, threshold)["f1"] for threshold in (-9.5, *(margin + 0.0 for _, _, margin in data), 9.5)]
    assert found["best_f1"] == pytest.approx(max(tried))
    assert score(questions, found["best_threshold"])["f1"] == pytest.approx(max(tried))


@pytest.mark.parametrize(
    ("paragraphs", "task", "words"),
    [
        ([("a film", [question("a film", None)])], {}, "set task.unanswerable=true for SQuAD v2.0"),
        ([("a film", [question("a good film", "film")])], {}, "lies outside the context"),
        ([("a film", [question("a film", "film")])], {"stride": 18}, "task.stride must be well below"),
        ([("a film", [question("a film", "film")])], {"max_length": 40}, "task.max_length must be at most 32"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, paragraphs: list, task: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, tokenizer, paragraphs, **task)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("paragraph", "words"),
    [
        ({"qas": [question("a film", "film")]}, "'context' is missing behind question 0"),
        ({"context": "a film", "qas": [{"id": "q", "answers": []}]}, "'question' is missing behind question 0"),
        ({"context": "a film", "qas": ["q"]}, "is no SQuAD behind question 0"),
    ],
)
def test_an_official_file_with_a_hole_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, paragraph: dict[str, Any], words: str
) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    data = {"train_file": str(file), "validation_file": str(file)}
    with pytest.raises(ConfigError) as caught:
        SquadTask.build(run_config({"data": data, "task": {"kind": "squad", "stride": 4}}), tokenizer, max_positions=32)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_of_a_run_do_not_depend_on_ranks(ranks: RankPools, tmp_path: Path, model_dir: Path) -> None:
    files = [
        official(tmp_path / f"{name}.json", made(count, seed)) for name, count, seed in (("a", 40, 1), ("b", 11, 2))
    ]
    scores = []
    for world_size in (1, 2):
        given_run = {
            "model": {"path": str(model_dir)},
            "data": {"train_file": str(files[0]), "validation_file": str(files[1])},
            "task": {"kind": "squad", "max_length": 20, "stride": 4, "n_best": 5},
            "train": {"epochs": 2, "global_batch_size": 8, "learning_rate": 1e-2},
            "logging": {"progress": "off", "plot": False},
            "output_dir": str(tmp_path / f"run{world_size}"),
        }
        ranks(world_size).run(train, given=given_run)
        scores.append([record.metrics for record in read_records(tmp_path / f"run{world_size}", EvaluationRecord)])
    assert scores[0][-1] == pytest.approx(scores[1][-1], abs=1e-3)
    assert set(scores[0][-1]) == {"exact", "f1", "loss"}
