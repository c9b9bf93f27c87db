"""Predicted beside measured on live engines: states to the byte, peaks within a tenth."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import settings

STATES = ("weights", "quantized_weights", "master_weights", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 6 million parameters, and rows as long as it reads."""
    folder = tmp_path_factory.mktemp("profile-sources")
    tiny.save_model(folder / "model")
    config = folder / "model" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"model_max_length": 32', '"model_max_length": 128'))
    shape = tf.BertConfig(
        vocab_size=5000,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=128,
    )
    tf.BertForSequenceClassification(shape).bert.save_pretrained(folder / "model")
    long = [{"text": " ".join(["film"] * 125), "label": label} for label in ("good", "bad")] * 16
    tiny.write_csv(folder / "train.csv", long)
    tiny.write_csv(folder / "test.csv", long[:4])
    return folder


def profiled(given: dict[str, Any]) -> list[dict[str, Any]]:
    """What a profile of every stage found on this rank."""
    from dataclasses import asdict

    from progtuning_ds.config import run_config
    from progtuning_ds.train.quiet import quiet_libraries

    config = run_config(given)
    quiet_libraries(config.logging)
    from progtuning_ds.train.profiling import run_profile

    return [asdict(record) | {"deviation": record.deviation} for record in run_profile(config, steps=1).records]


def check(
    ranks: RankPools,
    sources: Path,
    world_size: int,
    deepspeed: str,
    train: dict[str, Any],
    *,
    rel: float = 0.1,
    **sections: Any,
) -> None:
    given = settings(
        sources,
        sources / "run",
        train={"epochs": 3, "micro_batch_size": 4, "global_batch_size": 8 * world_size, **train},
        deepspeed=deepspeed,
        **sections,
    )
    for records in ranks(world_size).run(profiled, given=given, timeout=280):
        assert len(records) == 3
        for record in records:
            held = {name: record["predicted"].get(name, 0) + record["predicted_host"].get(name, 0) for name in STATES}
            assert held == {name: record["measured"].get(name, 0) for name in STATES}
            # A CPU's host memory is where its tensors are: what is predicted for the host counts too.
            everything = record["predicted_peak"] + sum(record["predicted_host"].values())
            assert everything == pytest.approx(record["measured_peak"], rel=rel)


@pytest.mark.parametrize(
    ("deepspeed", "embeddings"),
    [("zero2", "first_stage"), pytest.param("zero3", "always", marks=pytest.mark.slow)],
)
def test_the_peak_of_a_live_engine_is_predicted(
    ranks: RankPools, sources: Path, deepspeed: str, embeddings: str
) -> None:
    check(ranks, sources, 2, deepspeed, {"precision": "bf16"}, schedule={"embeddings": embeddings})


@pytest.mark.parametrize(
    ("deepspeed", "precision", "on_freeze"),
    [
        ("zero3", "fp32", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(["zero2", "zero3"], ["bf16", "fp32"], ["int8", "nf4"])
            if case != ("zero3", "fp32", "int8")
        ),
    ],
)
def test_the_peak_with_quantized_blocks_is_predicted(
    ranks: RankPools, sources: Path, deepspeed: str, precision: str, on_freeze: str
) -> None:
    check(ranks, sources, 2, deepspeed, {"precision": precision}, schedule={"on_freeze": on_freeze})


@pytest.mark.parametrize(
    ("deepspeed", "precision", "method"),
    [
        ("zero2", "fp32", {"quantization": "nf4"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("zero2", "fp32", {"quantization": "int8"}),
                ("zero2", "bf16", {"quantization": "nf4", "double_quant": False}),
                ("zero3", "fp32", {"quantization": "nf4"}),
                ("zero3", "fp32", {"quantization": "int8"}),
            ]
        ),
    ],
)
def test_the_peak_on_a_quantized_base_is_predicted(
    ranks: RankPools, sources: Path, deepspeed: str, precision: str, method: dict[str, Any]
) -> None:
    lora = {"kind": "lora", "rank": 4, **method}
    # What backward does not reach, ZeRO-3 lets go of in forward; it is still counted as gathered.
    rel = 0.25 if deepspeed == "zero3" else 0.1
    check(ranks, sources, 2, deepspeed, {"precision": precision}, rel=rel, method=lora)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_size": 8}])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("deepspeed", ["single_gpu", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_the_peak_of_every_flavour_is_predicted(
    request: pytest.FixtureRequest,
    ranks: RankPools,
    sources: Path,
    world_size: int,
    precision: str,
    rows: dict[str, int],
    checkpointing: bool,
    deepspeed: str,
) -> None:
    if (deepspeed, precision, rows["micro_batch_size"], checkpointing) == ("single_gpu", "fp32", 1, True):
        request.applymarker(pytest.mark.xfail(strict=True, reason="predicted 16% too low, see docs/memory.md"))
    model = {"gradient_checkpointing": checkpointing}
    check(ranks, sources, world_size, deepspeed, {"precision": precision, **rows}, model=model)


@pytest.mark.slow
def test_the_command_prints_both(sources: Path, tmp_path: Path) -> None:
    import json
    import subprocess
    import sys

    import yaml

    given = settings(sources, tmp_path / "run", train={"epochs": 2, "micro_batch_size": 4, "global_batch_size": 8})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "progtuning_ds.cli", "profile", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        [*command, "deepspeed=zero2", "--steps", "1", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout
    assert "measured" in done.stdout
    content = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [stage["stage"] for stage in content["stages"]] == [0, 1]
    for stage in content["stages"]:
        assert abs(stage["deviation"]) < 0.1
    assert not (tmp_path / "run").exists()
