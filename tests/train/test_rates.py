"""Warm-up again after boundaries, and learning rates that change from stage to stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from progtuning_ds.config import Hardware, load_deepspeed, run_config, settle
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import plan_stages
from progtuning_ds.train.rates import boundary_factor
from progtuning_ds.train.records import StepRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import train


def test_the_rate_rises_again_after_each_boundary() -> None:
    factor = boundary_factor(plan_stages(3, 3, 12), 2, 0.5)
    first = [1.0] * 4
    assert [factor(step) for step in range(4)] == first
    assert [factor(step) for step in range(4, 8)] == pytest.approx([0.5 / 3, 0.5 * 2 / 3, 0.5, 0.5])
    assert [factor(step) for step in range(8, 13)] == pytest.approx([0.25 / 3, 0.25 * 2 / 3, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("kind", [None, "cosine"])
def test_a_run_has_these_rates_in_all_groups(ranks: RankPools, tmp_path: Path, kind: str | None) -> None:
    tiny.save_model(tmp_path / "model", layers=3)
    tiny.write_csv(tmp_path / "train.csv", tiny.rows(32, seed=1))
    rates: dict[str, list[float]] = {}
    for name, more in (("plain", {}), ("ours", {"boundary_warmup_steps": 1, "stage_lr_factor": 0.5})):
        given: dict[str, Any] = {
            "model": {"path": str(tmp_path / "model")},
            "data": {"train_file": str(tmp_path / "train.csv"), "validation_fraction": 0.25},
            "train": {
                "epochs": 3,
                "global_batch_size": 8,
                "learning_rate": 1e-3,
                "lr_scheduler_type": kind or "constant",
                "warmup_steps": 0,
                **more,
            },
            "logging": {"progress": "off", "plot": False},
            "output_dir": str(tmp_path / name),
        }
        ranks(2).run(train, given=given)
        rates[name] = [record.learning_rate for record in read_records(tmp_path / name, StepRecord)]
    ratio = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)]
    assert ratio == pytest.approx([1, 1, 1, 0.25, 0.5, 0.5, 0.125, 0.25, 0.25])


def test_a_scheduler_of_the_deepspeed_file_is_refused() -> None:
    config = run_config(
        {
            "train": {"boundary_warmup_steps": 5},
            "deepspeed": {"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}},
        }
    )
    with pytest.raises(ConfigError, match=r"scheduler\.type is WarmupLR in the section deepspeed; remove it there"):
        settle(config, load_deepspeed(config.deepspeed), Hardware(world_size=1, device="cpu", bf16=True, fp16=False))
    preset = run_config({"train": {"stage_lr_factor": 0.5}})
    settings = settle(preset, load_deepspeed("zero2"), Hardware(world_size=1, device="cpu", bf16=True, fp16=False))
    assert settings.lr_scheduler_type == "linear"
