"""SQuAD's official exact match and F1, and the threshold of no answer. Standard library only.

After the evaluation script of SQuAD 2.0 (https://rajpurkar.github.io/SQuAD-explorer/), whose scores of answered
questions are those of version 1.1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)


@dataclass(frozen=True)
class Answered:
    """A question with what is true and what was said.

    Attributes:
        golds: the accepted answers; none where there is no answer.
        text: the best answer in the context, "" if there is none.
        no_answer: how much likelier no answer is than that, in logits; only compared with others and a threshold.
    """

    golds: tuple[str, ...]
    text: str
    no_answer: float = 0.0


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(gold: str, said: str) -> float:
    """1 if both are the same once normalized."""
    return float(normalize(gold) == normalize(said))


def f1(gold: str, said: str) -> float:
    """Harmonic mean of precision and recall of words; without an answer on a side, 1 if there is none on both."""
    ours, theirs = normalize(said).split(), normalize(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def score(questions: Sequence[Answered], threshold: float | None = None) -> dict[str, float]:
    """Score all questions, in percent.

    Args:
        questions: at least one.
        threshold: no answer is given where it is likelier by more than this (v2.0); None always answers (v1.1).

    Returns:
        `exact` and `f1`; with a threshold also those of questions with (`has_answer_...`) and without answer
        (`no_answer_...`), and `best_f1` with its `best_threshold`, which is found on the same questions.
    """
    said = ["" if threshold is not None and one.no_answer > threshold else one.text for one in questions]
    pairs = [_scores(one, text) for one, text in zip(questions, said, strict=True)]
    scores = _means(pairs, "")
    if threshold is None:
        return scores
    for name, having in (("has_answer_", True), ("no_answer_", False)):
        part = [pair for one, pair in zip(questions, pairs, strict=True) if bool(_golds(one) != [""]) == having]
        if part:
            scores |= _means(part, name)
    best, at = _best_f1(questions)
    return scores | {"best_f1": best, "best_threshold": at}


def _golds(one: Answered) -> list[str]:
    # An accepted answer that is nothing but articles and punctuation is none.
    return [gold for gold in one.golds if normalize(gold)] or [""]


def _scores(one: Answered, said: str) -> tuple[float, float]:
    golds = _golds(one)
    return max(exact(gold, said) for gold in golds), max(f1(gold, said) for gold in golds)


def _means(pairs: Sequence[tuple[float, float]], prefix: str) -> dict[str, float]:
    exacts, f1s = zip(*pairs, strict=True)
    return {f"{prefix}exact": 100 * sum(exacts) / len(pairs), f"{prefix}f1": 100 * sum(f1s) / len(pairs)}


def _best_f1(questions: Sequence[Answered]) -> tuple[float, float]:
    """The highest F1 any threshold gives: start with no answers at all, then give the surest ones first."""
    gained = total = sum(_golds(one) == [""] for one in questions)
    best, at = float(total), min(one.no_answer for one in questions) - 1.0
    ordered = sorted(questions, key=lambda one: one.no_answer)
    for index, one in enumerate(ordered):
        gained = gained + (_scores(one, one.text)[1] if _golds(one) != [""] else -1 if one.text else 0)
        is_last_of_its_kind = index + 1 == len(ordered) or ordered[index + 1].no_answer > one.no_answer
        if gained > best and is_last_of_its_kind:
            best, at = gained, one.no_answer
    return 100 * best / len(questions), at
