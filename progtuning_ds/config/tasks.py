"""The `task` section: one frozen dataclass per kind of task, told apart by `kind`. No torch, no deepspeed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]

GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


@dataclass(frozen=True, kw_only=True, config=_RULES)
class ClassificationConfig:
    """What is learnt from a row: the class of a sentence or of a pair of sentences."""

    kind: Literal["classification"] = "classification"
    """The task."""
    text_column: Text = "text"
    """Column of the (first) sentence."""
    pair_column: Text | None = None
    """Column of the second sentence, for sentence pairs."""
    label_column: Text = "label"
    """Column of the label: class names or integers."""
    max_length: Count | None = None
    """Tokens after which a text is cut; by default what the model can read."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class GlueConfig:
    """One of GLUE's nine tasks, with its columns, labels, official metrics and submission file."""

    kind: Literal["glue"]
    """The task."""
    name: GlueName
    """Which of the nine; without `data`, its rows come from the hub's nyu-mll/glue."""
    max_length: Count | None = None
    """Tokens after which a text (pair) is cut; by default 128."""
    submission: Flag = True
    """Predict the test split at the end, if there is one, and write it as GLUE's server takes it."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class TokensConfig:
    """The class of every word, such as named entities; scored by seqeval."""

    kind: Literal["token_classification"]
    """The task."""
    words_column: Text = "tokens"
    """Column of the words: a list of texts per row."""
    tags_column: Text = "ner_tags"
    """Column of the tags: a list of names or class indices per row, one per word."""
    max_length: Count | None = None
    """Tokens after which a row is cut; words behind count as `O` in evaluation."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class SquadConfig:
    """Answers found in a context: SQuAD v1.1, and v2.0 with questions that have none."""

    kind: Literal["squad"]
    """The task; without `data`, its rows come from the hub's rajpurkar/squad or squad_v2."""
    unanswerable: Flag = False
    """Whether there are questions without an answer (v2.0)."""
    max_length: Count | None = None
    """Tokens of question and piece of context together; by default 384."""
    stride: CountOrZero = 128
    """Tokens that neighbouring pieces of a long context share."""
    max_answer_length: Count = 30
    """Tokens of the longest answer."""
    n_best: Count = 20
    """Starts and ends that are combined for each piece."""
    no_answer_threshold: Number = 0.0
    """How much likelier than the best answer no answer must be to be given, in logits (v2.0)."""


@dataclass(frozen=True, kw_only=True, config=_RULES)
class CausalConfig:
    """Text continued, or conversations answered, by a causal language model."""

    kind: Literal["causal_lm"]
    """The task."""
    text_column: Text = "text"
    """Column of plain text, where there is no `messages_column`."""
    messages_column: Text | None = None
    """Column of conversations, lists of {role, content}: the chat template makes the text, answers alone are learnt."""
    max_length: Count | None = None
    """Tokens of a sequence; by default 1024, or what the model can read if that is less."""
    packing: Flag = True
    """Plain text: fill sequences with several documents, which do not see each other."""


TaskConfig = Annotated[
    ClassificationConfig | GlueConfig | TokensConfig | SquadConfig | CausalConfig, Field(discriminator="kind")
]
