"""What each of GLUE's tasks is: columns, labels, official files and scores. Standard library only.

Names of columns and the order of classes are those of the hub's `nyu-mll/glue`; files those of the official download
(https://gluebenchmark.com/tasks), scores and submission files those of its server.
"""

from __future__ import annotations

from dataclasses import dataclass

ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True, slots=True)
class GlueSpec:
    """One task.

    Attributes:
        texts: its one or two text columns.
        labels: names of the classes in order of index; none for regression.
        scores: metrics the server reports; the first one is the main one.
        official: column of the official files -> our column, the label's included.
        header: the column names of an official file that has no header line.
        submission: name of the submission file of each test split.
        named: whether a submission names classes (else it numbers them).
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    official: dict[str, str]
    submission: dict[str, str]
    header: tuple[str, ...] = ()
    named: bool = False

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers (STS-B: 0 to 5) and no classes."""
        return not self.labels


def _pair(first: str, second: str, label: str) -> dict[str, str]:
    return {first: first, second: second, label: "label"}


SPECS = {
    "cola": GlueSpec(
        texts=("sentence",),
        labels=("unacceptable", "acceptable"),
        scores=("matthews", "accuracy"),
        official={"sentence": "sentence", "label": "label"},
        header=("source", "label", "mark", "sentence"),
        submission={"test": "CoLA.tsv"},
    ),
    "sst2": GlueSpec(
        texts=("sentence",),
        labels=("negative", "positive"),
        scores=("accuracy",),
        official={"sentence": "sentence", "label": "label"},
        submission={"test": "SST-2.tsv"},
    ),
    "mrpc": GlueSpec(
        texts=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
        scores=("f1", "accuracy"),
        official={"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
        submission={"test": "MRPC.tsv"},
    ),
    "stsb": GlueSpec(
        texts=("sentence1", "sentence2"),
        labels=(),
        scores=("spearman", "pearson"),
        official=_pair("sentence1", "sentence2", "score"),
        submission={"test": "STS-B.tsv"},
    ),
    "qqp": GlueSpec(
        texts=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        scores=("f1", "accuracy"),
        official=_pair("question1", "question2", "is_duplicate"),
        submission={"test": "QQP.tsv"},
    ),
    "mnli": GlueSpec(
        texts=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        scores=("accuracy",),
        official={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        submission={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        named=True,
    ),
    "qnli": GlueSpec(
        texts=("question", "sentence"),
        labels=ENTAILMENT,
        scores=("accuracy",),
        official=_pair("question", "sentence", "label"),
        submission={"test": "QNLI.tsv"},
        named=True,
    ),
    "rte": GlueSpec(
        texts=("sentence1", "sentence2"),
        labels=ENTAILMENT,
        scores=("accuracy",),
        official=_pair("sentence1", "sentence2", "label"),
        submission={"test": "RTE.tsv"},
        named=True,
    ),
    "wnli": GlueSpec(
        texts=("sentence1", "sentence2"),
        labels=("not_entailment", "entailment"),
        scores=("accuracy",),
        official=_pair("sentence1", "sentence2", "label"),
        submission={"test": "WNLI.tsv"},
    ),
}

EVALUATIONS = {
    "mnli": {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"},
}
"""Split of the hub under each name of an evaluation, where it is not `validation` alone."""
