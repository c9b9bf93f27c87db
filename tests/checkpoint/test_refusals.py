"""What is no sound checkpoint of this run is refused in one line that names it; nothing is unpickled."""

from __future__ import annotations

import json
import pickletools
import random
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from progtuning_ds.checkpoint import CheckpointStore, open_checkpoint
from progtuning_ds.checkpoint.manifest import Manifest, read_manifest, write_manifest
from progtuning_ds.errors import CheckpointError
from tests.checkpoint.run import PLANS, Trained, build, read, train_through
from tests.ranks import RankPools

AT = 3
FILES = (
    *(
        f"rank-0000{rank}{suffix}"
        for rank in range(2)
        for suffix in (".json", ".safetensors", ".settled-1.safetensors")
    ),
    "state.json",
)


@pytest.fixture(scope="module")
def saved(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2).run(train_through, flavour="zero2-fp32", plan="shrinking", folder=str(folder))
    return CheckpointStore(folder).path(AT)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def problem(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_is_whole_and_standard(copy: Path) -> None:
    assert sorted(read_manifest(copy).files) == sorted(FILES)
    found = open_checkpoint(copy)
    assert (found.step, found.program) == (AT, {"step": AT})
    with safe_open(copy / "rank-00000.safetensors", framework="pt") as file:
        assert any(name.startswith("weights.bert.") for name in file.keys())  # noqa: SIM118 - no mapping
    for path in copy.iterdir():
        with pytest.raises(ValueError, match=r"."):  # no file is a pickle
            list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert problem(copy).endswith(f"is damaged: {name} is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    assert problem(copy).endswith(f"is damaged: {name} has {len(data) - 1} bytes instead of {len(data)}")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_flipped_bit_is_found_wherever_it_is(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    draw = random.Random(name)
    for _ in range(40):
        at = draw.randrange(len(whole) * 8)
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        (copy / name).write_bytes(data)
        assert name in problem(copy)


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    assert problem(tmp_path).endswith("is no checkpoint: it has no manifest.json")


def test_a_format_of_the_future_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_manifest(copy)
    monkeypatch.setattr("progtuning_ds.checkpoint.manifest.FORMAT", 3)
    write_manifest(copy, found)
    monkeypatch.undo()
    assert problem(copy).endswith("has format 3, this version reads up to 2")


# ---- sound, but not of this run ------------------------------------------------------------------------------------


def try_to_load(folder: str, plan: str = "shrinking", trained: bool = False, **model: int) -> str:
    from progtuning_ds.checkpoint import load_checkpoint

    engine, stages = build("zero2-fp32", plan, **model)
    engine.global_steps = int(trained)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(stages, folder)
    return str(caught.value)


def test_another_plan_is_refused_with_what_differs(ranks: RankPools, saved: Path) -> None:
    said = ranks(2).run(try_to_load, folder=str(saved), plan="rotating")
    theirs, ours = (
        [int(block) for block in range(3)] if plan == "shrinking" else [0, 1] for plan in ("shrinking", "rotating")
    )
    assert len(PLANS["rotating"]) == len(PLANS["shrinking"])
    expected = f"is of another stage plan: stages[0].trainable_blocks is {theirs} there and {ours} here"
    assert said == [f"checkpoint {saved} {expected}"] * 2


def test_another_model_is_refused_with_what_differs(ranks: RankPools, saved: Path) -> None:
    said = ranks(2).run(try_to_load, folder=str(saved), vocab_size=40)
    name = "bert.embeddings.word_embeddings.weight"
    assert said[0] == (f"checkpoint {saved} is of another model: {name!r} has shape (32, 24) there and (40, 24) here")


def test_an_engine_that_has_trained_is_refused(ranks: RankPools, saved: Path) -> None:
    said = ranks(1).run(try_to_load, folder=str(saved), trained=True)
    assert said[0] == "a checkpoint goes into a fresh engine, and this one has done 1 steps"


def test_a_checkpoint_of_another_deepspeed_is_as_good(ranks: RankPools, copy: Path) -> None:
    """The format is not DeepSpeed's, so its version is only told."""
    found = read_manifest(copy)
    about = json.loads(json.dumps(found.about))
    about["versions"]["deepspeed"] = "0.16.9"
    write_manifest(copy, Manifest(found.step, about, found.files))
    assert len(ranks(2).run(load_and_look, folder=str(copy))) == 2


def load_and_look(folder: str) -> Trained:
    from progtuning_ds.checkpoint import load_checkpoint

    engine, stages = build("zero2-fp32")
    assert load_checkpoint(stages, folder).step == AT
    return read(engine, stages, Trained())
