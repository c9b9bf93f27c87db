"""An export is the base model where nothing trained, the boundary's values where a block froze, and no pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.train.records import RunRecord, StageRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import settings, train


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("sources"), 58, 23)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    ("deepspeed", "precision"),
    [("zero2", "fp32"), ("zero3", "bf16"), pytest.param("zero1", "bf16", marks=pytest.mark.slow)],
)
def test_what_never_trained_is_the_base_and_what_froze_is_as_it_froze(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, precision: str
) -> None:
    given = settings(
        sources,
        tmp_path / "run",
        deepspeed=deepspeed,
        train={"precision": precision},
        # Block 0 and the embeddings never train, block 1 freezes after the first stage.
        schedule={
            "stages": [
                {"blocks": "1-3", "steps": 4, "embeddings": False},
                {"blocks": "2-3", "steps": 6, "embeddings": False},
            ]
        },
        checkpoint={"keep_last": 9},
    )
    ranks(2).run(train, given=given)
    exported = load_file(tmp_path / "run" / "final" / "model.safetensors")
    base = {f"bert.{name}": tensor for name, tensor in load_file(sources / "model" / "model.safetensors").items()}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    never = [name for name in base if name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))]
    frozen = [name for name in base if name.startswith("bert.encoder.layer.1.")]
    assert never
    assert frozen
    for name in never:
        assert torch.equal(bits(exported[name]), bits(base[name].to(dtype))), name
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    at_boundary, at_end = (weights(store.path(step)) for step in (4, 10))
    for name in frozen:
        assert torch.equal(bits(exported[name]), bits(at_boundary[name].view(exported[name].shape))), name
    assert any(not torch.equal(exported[name], base[name].to(dtype)) for name in frozen), "it trained before it froze"
    for name, tensor in exported.items():
        assert torch.equal(bits(tensor), bits(at_end[name].view(tensor.shape))), name


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, put together from its files with nothing but safetensors."""
    pieces: dict[str, list[torch.Tensor]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.startswith("weights."):
                pieces.setdefault(name.removeprefix("weights."), []).append(tensor)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def test_the_model_card_tells_how_it_was_made(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    ranks(2).run(train, given=settings(sources, tmp_path))
    text = (tmp_path / "final" / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert matter["tags"] == ["progtuning", "deepspeed"]
    assert "base_model" not in matter, "a local path means nothing to others"
    (run,), stages = read_records(tmp_path, RunRecord), read_records(tmp_path, StageRecord)
    for words in (
        str(sources / "model"),
        "`train.csv`",
        "58 training rows",
        f"{run.updated_params:,} instead of {run.updated_params_full:,}",
        f"| 1/2 | 1-5 | embeddings, blocks 0-3, head | {stages[0].trainable_params:,} |",
        f"| 2/2 | 6-10 | embeddings, blocks 2-3, head | {stages[1].trainable_params:,} |",
        f"accuracy {run.metrics['validation']['accuracy']:.4f}",
        f"deepspeed {run.versions['deepspeed']}",
    ):
        assert words in text, words
    assert not [path for path in (tmp_path / "final").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
