"""The SQuAD task: rows, batches, loss, answers and scores. Imports torch; no deepspeed."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from progtuning_ds.config import RunConfig, SquadConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.base import Batch, EncodedRows
from progtuning_ds.tasks.lengths import usual_length
from progtuning_ds.tasks.squad.pieces import EXAMPLE, NOWHERE, NULL, SPANS, START, STOP, cut_pieces
from progtuning_ds.tasks.squad.rows import ANSWERS, CONTEXT, ID, load_rows
from progtuning_ds.tasks.squad.scores import Answered, score

_OWN = (START, STOP, EXAMPLE, SPANS, NULL)


@dataclass(frozen=True)
class Question:
    """What scoring needs of a question."""

    id: str
    context: str
    golds: tuple[str, ...]


@dataclass(frozen=True)
class PiecePrediction:
    """Answers in one piece: which question, score of no answer, and best answers as (score, first and last character).

    Scores are sums of a start and an end logit; `loss` is the mean of both cross-entropies.
    """

    example: int
    null: float
    answers: tuple[tuple[float, int, int], ...]
    loss: float


class SquadTask:
    """Pieces of contexts with a question each; see `progtuning_ds.tasks.base.Task` for the attributes."""

    main_metric = "f1"
    auto_class = AutoModelForQuestionAnswering

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: SquadConfig,
        train: EncodedRows,
        evaluations: Mapping[str, EncodedRows],
        questions: Sequence[Question],
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.task = task
        self.train = train
        self.evaluations = dict(evaluations)
        self.questions = list(questions)
        self.notes = list(notes)
        self.model_settings: dict[str, Any] = {}

    @classmethod
    def build(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> SquadTask:
        """Load, check and encode the rows of a run.

        Raises:
            ConfigError: one line on a missing column, a question without answer in v1.1, ...
        """
        task = config.task
        assert isinstance(task, SquadConfig)
        if not tokenizer.is_fast:
            raise ConfigError("task.kind squad needs a fast tokenizer, which says where its tokens lie in a text")
        limit = usual_length(task.max_length, 384, tokenizer, max_positions)
        if task.stride >= limit - tokenizer.num_special_tokens_to_add(pair=True):
            raise ConfigError(f"task.stride must be well below task.max_length {limit}, got {task.stride}")
        splits = load_rows(config.data, task, config.train.seed)
        train = cut_pieces(splits.train, task, tokenizer, limit)
        questions: list[Question] = []
        evaluations = {}
        for name, split in (("validation", splits.evaluation), ("test", splits.test)):
            if split is not None:
                # Questions of both splits are numbered in one list: predictions are told apart by number alone.
                evaluations[name] = cut_pieces(split, task, tokenizer, limit, first_example=len(questions))
                questions += [Question(row[ID], row[CONTEXT], tuple(row[ANSWERS]["text"])) for row in split.rows]
        notes = [
            f"{len(splits.train.rows)} training questions in {len(train.rows)} pieces of up to {limit} tokens, "
            f"{len(splits.evaluation.rows)} validation questions in {len(evaluations['validation'].rows)}"
        ]
        return cls(tokenizer, task, train, evaluations, questions, notes)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad pieces to the longest: ids [rows, tokens]; spans [rows, tokens, 2]; the rest [rows]; int64."""
        features = [{key: value for key, value in row.items() if key not in _OWN} for row in rows]
        padded = dict(self.tokenizer.pad(features, return_tensors="pt"))
        length = padded["input_ids"].shape[1]
        left = self.tokenizer.padding_side == "left"
        shifts = [length - len(row[SPANS]) if left else 0 for row in rows]
        fillers = [[list(NOWHERE)] * (length - len(row[SPANS])) for row in rows]
        pairs = list(zip(rows, fillers, strict=True))
        spans = [filler + list(row[SPANS]) if left else list(row[SPANS]) + filler for row, filler in pairs]
        shifted = {
            name: torch.tensor([row[name] + shift for row, shift in zip(rows, shifts, strict=True)])
            for name in (START, STOP, NULL)
        }
        numbers = torch.tensor([row[EXAMPLE] for row in rows])
        return padded | shifted | {SPANS: torch.tensor(spans), EXAMPLE: numbers}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of first and last token in fp32; scalar."""
        return _losses(*_forward(model, batch), batch).mean()

    def predict(self, model: nn.Module, batch: Batch) -> list[PiecePrediction]:
        """The best answers of each piece."""
        starts, stops = _forward(model, batch)
        losses = _losses(starts, stops, batch).tolist()
        inside = (batch[SPANS][..., 0] >= 0).tolist()
        both = (starts.tolist(), stops.tolist(), batch[SPANS].tolist(), batch[NULL].tolist(), batch[EXAMPLE].tolist())
        predictions = []
        for row, (start, stop, spans, null, example) in enumerate(zip(*both, strict=True)):
            found = self._best(start, stop, inside[row])
            answers = tuple((value, spans[first][0], spans[last][1]) for value, first, last in found)
            predictions.append(PiecePrediction(example, start[null] + stop[null], answers, losses[row]))
        return predictions

    def _best(self, start: list[float], stop: list[float], inside: list[bool]) -> list[tuple[float, int, int]]:
        tokens = [token for token, is_inside in enumerate(inside) if is_inside]
        firsts = heapq.nlargest(self.task.n_best, tokens, key=start.__getitem__)
        lasts = heapq.nlargest(self.task.n_best, tokens, key=stop.__getitem__)
        spans = [
            (start[first] + stop[last], first, last)
            for first in firsts
            for last in lasts
            if first <= last < first + self.task.max_answer_length
        ]
        return heapq.nlargest(self.task.n_best, spans)

    def answers(self, predictions: Sequence[PiecePrediction]) -> dict[str, Answered]:
        """The answer to each question that was asked, by its id: the best one of all its pieces."""
        best: dict[int, tuple[float, int, int]] = {}
        null: dict[int, float] = {}
        for piece in predictions:
            # A piece that surely does not hold the answer says nothing of the others: the least sure one counts.
            null[piece.example] = min(null.get(piece.example, float("inf")), piece.null)
            for answer in piece.answers[:1]:
                best[piece.example] = max(best.get(piece.example, answer), answer)
        found = {}
        for example, no_answer in sorted(null.items()):
            question = self.questions[example]
            value, first, last = best.get(example, (float("-inf"), 0, 0))
            # A piece without any context token has no answer at all.
            margin = no_answer - value if example in best else 1e9
            found[question.id] = Answered(question.golds, question.context[first:last], margin)
        return found

    def metrics(self, predictions: Sequence[PiecePrediction]) -> dict[str, float]:
        """Official exact match and F1 in percent, and the mean loss over pieces."""
        threshold = self.task.no_answer_threshold if self.task.unanswerable else None
        scores = score(list(self.answers(predictions).values()), threshold)
        return scores | {"loss": sum(piece.loss for piece in predictions) / len(predictions)}


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of first and last token, [rows, tokens] fp32; -inf on padding."""
    inputs = {key: value for key, value in batch.items() if key not in _OWN}
    output = model(**inputs)
    padding = batch["attention_mask"] == 0
    low = torch.finfo(torch.float32).min
    return output.start_logits.float().masked_fill(padding, low), output.end_logits.float().masked_fill(padding, low)


def _losses(starts: Tensor, stops: Tensor, batch: Batch) -> Tensor:
    both = ((starts, batch[START]), (stops, batch[STOP]))
    return sum((functional.cross_entropy(logits, at, reduction="none") for logits, at in both), torch.zeros(())) / 2
