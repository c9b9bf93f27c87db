"""Weights that no longer change are written once: later checkpoints link them, and each is whole by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.checkpoint.manifest import FileSeal, Manifest, write_manifest
from progtuning_ds.checkpoint.sharing import link_or_write, with_twin, written_bytes
from progtuning_ds.checkpoint.tensor_file import file_size, seal_tensors, write_tensors
from tests.checkpoint.run import STEPS, TOTAL, Trained, build, train
from tests.ranks import RankPools

NAME = "rank-00000.settled-0.safetensors"
FROZEN = {"weights.a": torch.arange(10.0), "weights.b": torch.ones(3, dtype=torch.uint8)}


def publish(store: CheckpointStore, step: int, tensors: dict[str, torch.Tensor]) -> tuple[Path, FileSeal]:
    folder = store.begin(step)
    seal = link_or_write(with_twin(store, NAME, tensors), folder)
    write_manifest(folder, Manifest(step, {}, {NAME: seal}))
    return store.publish(folder, step), seal


def test_a_file_is_sealed_as_it_would_be_written(tmp_path: Path) -> None:
    seal = write_tensors(tmp_path / "file", FROZEN)
    assert seal_tensors(FROZEN) == seal
    assert file_size(FROZEN) == seal.size == (tmp_path / "file").stat().st_size


def test_the_same_bytes_get_a_second_name_and_outlive_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first, seal = publish(store, 1, FROZEN)
    second, again = publish(store, 2, {name: tensor.clone() for name, tensor in FROZEN.items()})
    assert again == seal
    assert (first / NAME).samefile(second / NAME)
    assert with_twin(store, NAME, FROZEN).to_write == 0
    assert written_bytes(second) == (second / "manifest.json").stat().st_size
    store.remove_all_but({2})
    assert load_file(second / NAME).keys() == FROZEN.keys()


def test_other_bytes_of_the_same_size_are_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first, _ = publish(store, 1, FROZEN)
    other = {**FROZEN, "weights.a": FROZEN["weights.a"].flip(0)}
    second, _ = publish(store, 2, other)
    assert not (first / NAME).samefile(second / NAME)
    assert torch.equal(load_file(second / NAME)["weights.a"], other["weights.a"])


def test_a_file_that_has_lost_bytes_is_not_linked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first, seal = publish(store, 1, FROZEN)
    os.truncate(first / NAME, seal.size - 1)
    second, _ = publish(store, 2, FROZEN)
    assert (second / NAME).stat().st_size == seal.size


def test_where_nothing_can_be_linked_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    store = CheckpointStore(tmp_path)
    publish(store, 1, FROZEN)
    monkeypatch.setattr(os, "link", refuse)
    second, seal = publish(store, 2, FROZEN)
    assert written_bytes(second) > seal.size
    assert torch.equal(load_file(second / NAME)["weights.a"], FROZEN["weights.a"])


# ---- on live ranks -------------------------------------------------------------------------------------------------

FREEZES = "bert.encoder.layer.0.output.dense.weight"


def save_on_the_way(flavour: str, folder: str) -> dict[str, torch.Tensor]:
    """Save after every step, at the end after a frozen weight was touched and after it came back; see the tests."""
    from progtuning_ds.checkpoint import save_checkpoint
    from progtuning_ds.train.export import full_state_dict
    from progtuning_ds.zero.held_state import held_weights

    engine, stages = build(flavour, dropout=0.0)
    train(engine, stages, range(TOTAL), Trained(), folder)
    with torch.no_grad():
        for place in held_weights(stages.adapter):
            if place.name == FREEZES:
                place.tensor.add_(1.0)
    save_checkpoint(stages, folder, TOTAL + 1, program={"step": TOTAL + 1})
    stages.retarget([*stages.trainable_names, FREEZES])
    save_checkpoint(stages, folder, TOTAL + 2, program={"step": TOTAL + 2})
    return full_state_dict(engine.module, keep=True)


def load_the_last(flavour: str, folder: str) -> dict[str, torch.Tensor]:
    from progtuning_ds.checkpoint import load_checkpoint
    from progtuning_ds.train.export import full_state_dict

    engine, stages = build(flavour, dropout=0.0)
    load_checkpoint(stages, CheckpointStore(Path(folder)).path(TOTAL + 1))
    return full_state_dict(engine.module, keep=True)


@pytest.mark.parametrize("flavour", ["zero3-bf16", pytest.param("zero2-fp32", marks=pytest.mark.slow)])
def test_what_has_frozen_is_written_once_and_only_while_it_stays_as_it_is(
    ranks: RankPools, tmp_path: Path, flavour: str
) -> None:
    weights = ranks(2).run(save_on_the_way, flavour=flavour, folder=str(tmp_path))[0]
    store = CheckpointStore(tmp_path)
    for step in store.steps():
        files = {path.name for path in store.path(step).glob("*.settled-*")}
        began = [stage for stage in (1, 2) if step > stage * STEPS]
        assert files == {f"rank-0000{rank}.settled-{stage}.safetensors" for rank in range(2) for stage in began}, step

    def same(name: str, one: int, other: int) -> bool:
        return (store.path(one) / name).samefile(store.path(other) / name)

    for rank in range(2):
        names = [f"rank-0000{rank}.settled-{stage}.safetensors" for stage in (1, 2)]
        assert same(names[0], STEPS + 1, TOTAL), "written in the second stage, linked in the third"
        assert same(names[1], TOTAL - 1, TOTAL)
        assert same(names[1], TOTAL, TOTAL + 2), "another stage's file is as it was"
        assert not (store.path(TOTAL) / f"rank-0000{rank}.safetensors").stat().st_nlink > 1
    touched = [rank for rank in range(2) if not same(f"rank-0000{rank}.settled-1.safetensors", TOTAL, TOTAL + 1)]
    assert touched, "a frozen weight that changed all the same is saved as it is"
    back = [load_file(path) for path in sorted(store.path(TOTAL + 2).glob("rank-0000?.safetensors"))]
    assert any(f"weights.{FREEZES}" in tensors for tensors in back), "it trains again"
    store.remove_all_but({TOTAL + 1})
    loaded = ranks(2).run(load_the_last, flavour=flavour, folder=str(tmp_path))[0]
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name


def a_model_with_a_base_that_never_trains(folder: str) -> list[dict[str, Any]]:
    """LoRA on three blocks: what three saves wrote."""
    import deepspeed

    import progtuning_ds
    from progtuning_ds.checkpoint import save_checkpoint
    from progtuning_ds.methods import Method, apply_method
    from tests.checkpoint.run import PLANS, batch
    from tests.engine.problem import import_transformers

    torch.manual_seed(0)
    transformers = import_transformers()
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, num_labels=3
    )
    model = apply_method(transformers.BertForSequenceClassification(config), Method(kind="lora", rank=2))
    blocks = progtuning_ds.discover_blocks(model)
    plan = progtuning_ds.custom_plan(3, PLANS["shrinking"])
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=progtuning_ds.param_groups(model, plan, blocks),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 2},
        },
    )
    stages = progtuning_ds.StageEngine(engine, plan, blocks)
    told = []
    for step in range(3):
        stages.advance(step)
        engine.backward(engine(**batch(step, 0, engine.device)).loss)
        engine.step()
        path = save_checkpoint(stages, folder, step + 1)
        size = sum(file.stat().st_size for file in path.iterdir())
        told.append({"size": size, "written": written_bytes(path)})
    return told


def test_a_base_that_never_trains_is_written_with_the_first_checkpoint_only(ranks: RankPools, tmp_path: Path) -> None:
    first, second, third = ranks(2).run(a_model_with_a_base_that_never_trains, folder=str(tmp_path))[0]
    assert first["written"] == first["size"]
    for later in (second, third):
        assert later["size"] > 400_000
        assert later["written"] < later["size"] / 4
    base = [CheckpointStore(tmp_path).path(3) / f"rank-0000{rank}.settled-0.safetensors" for rank in range(2)]
    names = {name for path in base for name in load_file(path)}
    assert any("base_layer.weight" in name for name in names)
    assert not any("lora_" in name for name in names)
