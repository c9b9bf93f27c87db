"""A run that quantizes blocks when they freeze: both exports, exact weights on disk, resume to the bit, refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.train.records import RunRecord, StageRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_export import weights
from tests.train.test_resume import run, same_results
from tests.train.test_run import settings

BOUNDARY = 5  # steps to the end of the first of two stages, after which blocks 0 and 1 freeze


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("sources"), 58, 23, dropout=0.1)


def given(sources: Path, folder: Path, on_freeze: str = "nf4", **more: Any) -> dict[str, Any]:
    made = settings(sources, folder, checkpoint={"keep_last": 9}, **more)
    return {**made, "schedule": {**made.get("schedule", {}), "on_freeze": on_freeze}}


@pytest.mark.parametrize(
    ("deepspeed", "on_freeze"),
    [("zero2", "nf4"), pytest.param("zero3", "int8", marks=pytest.mark.slow)],
)
def test_either_export_holds_what_it_says_and_both_are_scored(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, on_freeze: str
) -> None:
    exported = {}
    for frozen in ("dequantized", "exact"):
        folder = tmp_path / frozen
        assert ranks(2).run(
            run, given=given(sources, folder, on_freeze, deepspeed=deepspeed, export={"frozen": frozen})
        ) == [None, None]
        exported[frozen] = load_file(folder / "final" / "model.safetensors")
        record = read_records(folder, RunRecord)[-1]
        assert record.frozen_metrics.keys() == {"dequantized", "exact"}
        assert all(scores.keys() == record.metrics.keys() for scores in record.frozen_metrics.values())
        seen = record.frozen_metrics["dequantized"]["validation"]["loss"]
        assert seen == pytest.approx(record.metrics["validation"]["loss"], abs=1e-5)
        assert record.frozen_metrics["exact"]["validation"]["loss"] != seen
        card = (folder / "final" / "README.md").read_text()
        words = {"dequantized": "what later stages saw, dequantized", "exact": "the exact weights it had when it froze"}
        assert f"quantized to {on_freeze} when they froze" in card
        assert f"export holds {words[frozen]}" in card
        assert f"frozen blocks {frozen}, as in this export: accuracy" in card
        stage = read_records(folder, StageRecord)[1]
        assert stage.released_bytes["weights"] > -stage.released_bytes["quantized_weights"] > 0
    kept = {
        name: tensor
        for path in sorted((tmp_path / "exact" / "frozen").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    assert {name.split(".")[3] for name in kept} == {"0", "1"}
    at_boundary = weights(CheckpointStore(tmp_path / "exact" / "checkpoints").path(BOUNDARY))
    for name, tensor in exported["exact"].items():
        other = exported["dequantized"][name]
        if name not in kept:
            assert torch.equal(tensor, other), name
            continue
        assert torch.equal(tensor, kept[name])
        assert torch.equal(tensor.view(-1), at_boundary[name])
        step = tensor.abs().amax() * (0.15 if on_freeze == "nf4" else 1 / 254)
        assert 0 < (tensor - other).abs().max() <= 1.05 * step


@pytest.mark.slow
@pytest.mark.parametrize(("deepspeed", "on_freeze"), [("zero2", "nf4"), ("zero3", "nf4")])
def test_a_run_stopped_after_a_freeze_goes_on_to_the_bit(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: str, on_freeze: str
) -> None:
    whole, parts = (given(sources, tmp_path / name, on_freeze, deepspeed=deepspeed) for name in ("whole", "parts"))
    assert ranks(2).run(run, given=whole) == [None, None]
    said = ranks(2).run(run, given=parts, signal_at=BOUNDARY + 1)
    assert said[0].startswith("PreemptedError")
    files = sorted((tmp_path / "parts" / "frozen").iterdir())
    written = [path.stat().st_mtime_ns for path in files]
    assert [path.name for path in files] == ["block-00000.safetensors", "block-00001.safetensors"]
    branch = given(sources, tmp_path / "branch", on_freeze, deepspeed=deepspeed)
    assert ranks(2).run(run, given=parts, resume="auto") == [None, None]
    same_results(tmp_path / "parts", tmp_path / "whole")
    scores = [read_records(tmp_path / name, RunRecord)[-1].frozen_metrics for name in ("parts", "whole")]
    assert scores[0] == scores[1]
    assert [path.stat().st_mtime_ns for path in files] == written, "written once"
    # From elsewhere, on another number of ranks and under another ZeRO stage: the same codes.
    point = CheckpointStore(tmp_path / "parts" / "checkpoints").path(BOUNDARY + 2)
    other = {**branch, "deepspeed": "zero1", "train": {**branch["train"], "micro_batch_size": 4}}
    assert ranks(1).run(run, given=other, resume=str(point)) == [None]
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("branch", "whole"))
    for name in load_file(files[0]):
        assert torch.equal(ours[name], theirs[name])
    assert [path.read_bytes() for path in sorted((tmp_path / "branch" / "frozen").iterdir())] == [
        path.read_bytes() for path in files
    ]


@pytest.mark.slow
def test_a_run_that_goes_back_before_a_freeze_freezes_again(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    """Also with checkpoints written in the background, whose memory the freeze must leave alone."""
    quick = {"logging": {"steps": 1, "progress": "off"}}
    whole, back = (given(sources, tmp_path / name, **quick) for name in ("whole", "back"))
    back |= {"guard": {"action": "rollback", "max_rollbacks": 1, "rollback_factor": 0.999999}}
    back["checkpoint"] |= {"asynchronous": True}
    assert ranks(2).run(run, given=whole) == [None, None]
    assert ranks(2).run(run, given=back, nan_at=(BOUNDARY + 1,)) == [None, None]
    records = [read_records(tmp_path / name, RunRecord)[-1] for name in ("back", "whole")]
    ours, theirs = (record.frozen_metrics["exact"]["validation"]["loss"] for record in records)
    assert ours == pytest.approx(theirs, abs=1e-3)
    files = [sorted((tmp_path / name / "frozen").iterdir()) for name in ("back", "whole")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.slow
def test_exact_weights_that_are_damaged_or_gone_are_named(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    made = given(sources, tmp_path / "run")
    ranks(2).run(run, given=made, signal_at=BOUNDARY)
    path = tmp_path / "run" / "frozen" / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = ranks(2).run(run, given=made, resume="auto")
    line = f"CheckpointError: exact weights of frozen blocks in {path.parent}: {path.name} does not have its checksum"
    assert said == [line, line]
    os.unlink(path)
    said = ranks(2).run(run, given=made, resume="auto")
    assert said[0].endswith(f"{path.name} is missing")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": {"kind": "lora"}}, "schedule.on_freeze must be keep with method.kind lora, got 'nf4'"),
        (
            {"schedule": {"stages": [{"blocks": "2-3", "steps": 5}, {"blocks": "0-3", "steps": 5}]}},
            "schedule.on_freeze must be keep here, got 'nf4': no block of the plan freezes",
        ),
        ({"schedule": {"on_freeze": "keep"}, "export": {"frozen": "exact"}}, "export.frozen exact needs schedule.on_"),
        ({"schedule": {"on_freeze": "nf5"}}, "schedule.on_freeze must be one of"),
    ],
)
def test_settings_that_do_not_fit_get_one_line(
    ranks: RankPools, sources: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    made = given(sources, tmp_path / "run")
    schedule = {**made["schedule"], **more.pop("schedule", {})}
    if "stages" in schedule:
        schedule.pop("num_stages", None)
    [line] = ranks(1).run(refusal, given={**made, **more, "schedule": schedule})
    assert line.startswith(f"ConfigError: {said}"), line
    assert "\n" not in line
    assert json.dumps(line)


def refusal(given: dict[str, Any]) -> str:
    from progtuning_ds.config import run_config
    from progtuning_ds.errors import ConfigError
    from progtuning_ds.train.program import run_program

    try:
        run_program(run_config(given))
    except ConfigError as error:
        return f"ConfigError: {error}"
    return ""
