"""Every shipped configuration, with a small model and local files in place of the hub's, passes a dry run."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from datasets import Dataset

from tests.ranks import RankPools
from tests.tasks import tiny_lm
from tests.tasks.test_glue import OFFICIAL, official
from tests.tasks.test_squad import made
from tests.tasks.test_squad import official as official_squad
from tests.train import tiny


def dry(preset: str, overrides: list[str]) -> str:
    from progtuning_ds.config import load_run_config
    from progtuning_ds.train.program import run_dry

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_dry(load_run_config(preset, overrides))
    return out.getvalue()


def encoder(folder: Path) -> str:
    """A BERT that reads as long as the presets ask."""
    path = tiny.save_model(folder / "bert", layers=6)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, key: 512}))
    return f"model.path={path}"


def llama(folder: Path) -> str:
    """A Llama without weights: a dry run needs none."""
    path = folder / "llama"
    tiny_lm.config(
        max_position_embeddings=8192, num_hidden_layers=6, architectures=["LlamaForCausalLM"]
    ).save_pretrained(path)
    tiny_lm.tokenizer().save_pretrained(path)
    return f"model.path={path}"


@pytest.mark.parametrize("preset", ["llama_1b_chat", "llama_8b_chat"])
def test_recipes_for_large_llamas(ranks: RankPools, tmp_path: Path, preset: str) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text[:2]}, {"role": "assistant", "content": text}]}
        for text in tiny_lm.texts(300)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [llama(tmp_path), f"data.train_file={tmp_path / 'train.jsonl'}"]
    (said,) = ranks(1).run(dry, preset=preset, overrides=overrides)
    assert "in bf16, ZeRO stage 3" in said
    for stage, blocks in (("1/3", "0-5"), ("2/3", "2-5"), ("3/3", "4-5")):
        assert any(line.split()[:1] == [stage] and blocks in line for line in said.splitlines())
    assert "dry run: nothing was trained" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_every_task_of_glue(ranks: RankPools, tmp_path: Path, name: str) -> None:
    overrides = [encoder(tmp_path), f"data.source={official(tmp_path / 'glue', name, 40)}", f"task.name={name}"]
    (said,) = ranks(1).run(dry, preset="glue", overrides=overrides)
    assert "3/3" in said
    assert "dry run: nothing was trained" in said


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "stages"), [("squad", 3), ("squad_v2", 2)])
def test_both_squads(ranks: RankPools, tmp_path: Path, preset: str, stages: int) -> None:
    file = official_squad(tmp_path / "squad.json", made(40, 1, unanswerable=preset == "squad_v2"))
    overrides = [encoder(tmp_path), f"data.train_file={file}", f"data.validation_file={file}"]
    (said,) = ranks(1).run(dry, preset=preset, overrides=overrides)
    assert f"{stages}/{stages}" in said


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["csv_files", "causal_lm", "token_classification"])
def test_presets_for_ones_own_files(ranks: RankPools, tmp_path: Path, preset: str) -> None:
    rows = tiny.rows(60)
    tiny.write_csv(tmp_path / "train.csv", rows)
    tags = {
        "tokens": [row["text"].split() for row in rows],
        "ner_tags": [["O"] * len(row["text"].split()) for row in rows],
    }
    Dataset.from_dict(tags).to_json(tmp_path / "tags.jsonl")
    Dataset.from_dict({"text": tiny_lm.texts(60)}).to_parquet(tmp_path / "text.parquet")
    file = {"csv_files": "train.csv", "causal_lm": "text.parquet", "token_classification": "tags.jsonl"}[preset]
    model = llama(tmp_path) if preset == "causal_lm" else encoder(tmp_path)
    overrides = [model, f"data.train_file={tmp_path / file}"]
    if preset == "token_classification":
        overrides.append(f"data.validation_file={tmp_path / file}")
    (said,) = ranks(1).run(dry, preset=preset, overrides=overrides)
    assert "dry run: nothing was trained" in said
