"""What each block contributes: trained alone on live ranks, and the fast estimate against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from progtuning_ds.config import run_config
from progtuning_ds.train.probing import Probe, draw_probe, run_probe
from tests.ranks import RankPools
from tests.train import tiny


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("probe")
    tiny.save_model(folder / "model", layers=3)
    tiny.write_csv(folder / "train.csv", tiny.rows(24, seed=1))
    tiny.write_csv(folder / "test.csv", tiny.rows(11, seed=2))
    return {
        "model": {"path": str(folder / "model")},
        "data": {"train_file": str(folder / "train.csv"), "validation_file": str(folder / "test.csv")},
        "train": {"epochs": 1, "global_batch_size": 8, "learning_rate": 5e-3},
        "schedule": {"num_stages": 1},
    }


def probed(settings: dict[str, Any], **options: Any) -> Probe:
    from progtuning_ds.train.quiet import quiet_libraries

    config = run_config(settings)
    quiet_libraries(config.logging)
    return run_probe(config, **options)


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_each_block_is_trained_alone_from_the_same_weights(
    ranks: RankPools, tmp_path: Path, given: dict[str, Any], deepspeed: str
) -> None:
    settings = {**given, "deepspeed": deepspeed, "output_dir": str(tmp_path / "run")}
    found, other = ranks(2).run(probed, settings=settings)
    assert found == other
    assert [one.block for one in found.blocks] == [None, 0, 1, 2]
    alone = found.blocks[0].metrics["accuracy"]
    assert [one.contribution for one in found.blocks] == [one.metrics["accuracy"] - alone for one in found.blocks]
    losses = [one.metrics["loss"] for one in found.blocks]
    assert len(set(losses)) == 4, "other blocks, other models"
    assert not (tmp_path / "run").exists()
    draw_probe(found, tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_the_fast_estimate_is_the_gradient_of_the_mean_loss(ranks: RankPools, given: dict[str, Any]) -> None:
    found = ranks(2).run(probed, settings=given, fast=True)[0]
    assert sum(one.contribution for one in found.blocks) == pytest.approx(1)

    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(0)
    path = given["model"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    rows = tiny.rows(24, seed=1)
    for row in rows:  # one at a time, without padding; 24 rows are three whole steps
        label = torch.tensor([int(row["label"] == "positive")])
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        (torch.nn.functional.cross_entropy(logits, label) / len(rows)).backward()
    layers = model.bert.encoder.layer
    squares = [sum(p.grad.double().square().sum().item() for p in layer.parameters()) for layer in layers]
    assert [one.contribution for one in found.blocks] == pytest.approx(
        [value / sum(squares) for value in squares], rel=1e-3
    )
