"""Causal language modelling: packing without leaks, answers alone learnt, perplexity against plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from progtuning_ds.config import run_config
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks import CausalTask
from progtuning_ds.tasks.causal.chat import IGNORED, encode_chat
from progtuning_ds.tasks.causal.leaks import check_no_leak
from progtuning_ds.tasks.causal.packing import pack
from progtuning_ds.train.records import EvaluationRecord, read_records
from tests.ranks import RankPools
from tests.tasks import tiny_lm
from tests.train.test_run import train


def built(tmp_path: Path, template: str | None = tiny_lm.TEMPLATE, rows: Any = None, **task: Any) -> CausalTask:
    rows = rows or {"text": tiny_lm.texts(9)}
    source = tmp_path / "data"
    DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(rows)).save_to_disk(source)
    config = run_config({"data": {"source": str(source)}, "task": {"kind": "causal_lm", **task}})
    return CausalTask.build(config, tiny_lm.tokenizer(template), max_positions=64)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), max_size=12), st.integers(2, 16))
def test_packing_keeps_every_token_in_order(documents: list[list[int]], length: int) -> None:
    packed = list(pack(documents, length))
    assert [token for ids, _ in packed for token in ids] == [token for document in documents for token in document]
    assert all(len(ids) == len(positions) <= length for ids, positions in packed)
    assert all(len(ids) == length for ids, _ in packed[:-1])
    begins = {0}
    for document in documents:
        begins.add(max(begins) + len(document))
    flat = [position for _, positions in packed for position in positions]
    for index, position in enumerate(flat):
        # Counts up from 0; begins again with each document and each sequence.
        new = index in begins or index % length == 0
        assert position == (0 if new else flat[index - 1] + 1)


def some_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(tiny_lm.config(attn_implementation="sdpa")).eval()
    if kind == "llama-eager":
        return LlamaForCausalLM(tiny_lm.config(attn_implementation="eager")).eval()
    words = tiny_lm.config().vocab_size
    return GPT2LMHeadModel(GPT2Config(vocab_size=words, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


@pytest.mark.parametrize("kind", ["llama", "llama-eager", "gpt2"])
def test_packed_documents_score_as_if_they_were_alone(tmp_path: Path, kind: str) -> None:
    task, model = built(tmp_path, max_length=40), some_model(kind)
    batch = task.collate([task.train.rows[index] for index in range(len(task.train.rows))])
    with torch.no_grad():
        together = task.predict(model, batch)
        nll, tokens = 0.0, 0
        for row in task.train.rows:
            starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
            for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
                alone = torch.tensor([row["input_ids"][start:stop]])
                scores = model(input_ids=alone).logits[0, :-1].double().log_softmax(-1)
                nll -= scores.gather(1, alone[0, 1:, None]).sum().item()
                tokens += stop - start - 1
    assert sum(row.tokens for row in together) == tokens
    assert sum(row.nll for row in together) == pytest.approx(nll, rel=1e-5)
    assert task.metrics(together)["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


class Leaky(nn.Module):
    """Ignores where positions begin again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = some_model("llama")

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_sees_across_documents_is_refused() -> None:
    ids = torch.arange(3, 20)[None]
    check_no_leak(some_model("llama"), ids)
    check_no_leak(some_model("gpt2"), ids)
    with pytest.raises(ConfigError, match=r"set task\.packing=false"):
        check_no_leak(Leaky(), ids)


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in (turn.split(": ", maxsplit=1) for turn in turns)]


def test_answers_alone_are_learnt() -> None:
    tokenizer = tiny_lm.tokenizer()
    ids, labels = encode_chat(
        tokenizer, chat("system: w0", "user: w1 w2", "assistant: w3 w4", "user: w5", "assistant: w6")
    )
    words = tokenizer.convert_ids_to_tokens(ids)
    learnt = [word for word, label in zip(words, labels, strict=True) if label != IGNORED]
    assert learnt == ["w3", "w4", "</s>", "w6", "</s>"]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m['role'] + ': ' + m['content'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, chat("user: w1", "assistant: w2"), "needs a tokenizer with a chat template"),
        (tiny_lm.TEMPLATE, chat("user: w1"), "no message of role assistant in row 0 of split 'train'"),
        (FORGETFUL, chat("user: w1", "assistant: w2", "user: w1", "assistant: w2"), "changes earlier messages"),
        (tiny_lm.TEMPLATE, [{"role": "user", "text": "w1"}], "must hold lists of {role, content}"),
    ],
)
def test_what_is_wrong_with_conversations_is_one_line(
    tmp_path: Path, template: str | None, messages: list[dict[str, str]], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, template, {"messages": [messages] * 2}, messages_column="messages")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_length_beyond_the_model_and_a_column_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.max_length must be at most 64, the longest the model reads"):
        built(tmp_path, max_length=65)
    with pytest.raises(ConfigError, match="'number' must hold text"):
        built(tmp_path, rows={"number": [1, 2]}, text_column="number", max_length=32)


@pytest.mark.parametrize("style", ["packed", "chat"])
def test_scores_of_a_run_do_not_depend_on_ranks(ranks: RankPools, tmp_path: Path, style: str) -> None:
    tiny_lm.save_model(tmp_path / "model")
    lines = tiny_lm.texts(50)
    rows: dict[str, Any] = {"text": lines}
    task: dict[str, Any] = {"kind": "causal_lm", "max_length": 48}
    if style == "chat":
        rows = {"talk": [chat(f"user: {line[:5]}", f"assistant: {line}") for line in lines]}
        task["messages_column"] = "talk"
    DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows).select(range(23))).save_to_disk(
        tmp_path / "data"
    )
    scores = []
    for world_size, micro in ((1, 4), (2, 2)):
        run = {
            "model": {"path": str(tmp_path / "model")},
            "data": {"source": str(tmp_path / "data")},
            "task": task,
            "train": {"epochs": 3, "global_batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-2},
            "logging": {"progress": "off", "plot": False},
            "output_dir": str(tmp_path / f"run{world_size}"),
        }
        ranks(world_size).run(train, given=run)
        scores.append([record.metrics for record in read_records(tmp_path / f"run{world_size}", EvaluationRecord)])
    assert [one["loss"] for one in scores[0]] == pytest.approx([one["loss"] for one in scores[1]], abs=2e-2)
    assert scores[0][-1]["perplexity"] < 0.8 * len(tiny_lm.WORDS), "words follow each other in order"
    assert scores[0][-1]["perplexity"] == pytest.approx(math.exp(scores[0][-1]["loss"]))
