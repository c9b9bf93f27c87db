"""Predicted bytes of weights and optimizer state are those that live engines report, to the byte."""

from __future__ import annotations

from itertools import product

import pytest

from progtuning_ds.memory import STATES, EngineSetup
from tests.engine.flavours import ALL, FLAVOURS, Flavour
from tests.memory.ranks_hold import held_by_stage, workload
from tests.ranks import RankPools

FEW = ["zero0-bf16", "zero1-bf16", "zero2-fp32", "zero2-offload-bf16", "zero3-bf16", "bf16-optimizer"]


def setup_of(flavour: Flavour, world_size: int, on_freeze: str) -> EngineSetup:
    return EngineSetup(
        zero_stage=flavour.stage,
        world_size=world_size,
        precision="bf16" if flavour.mixed else "fp32",
        offload_optimizer=flavour.offload,
        offload_param="offload_param" in flavour.zero,
        fp32_gradients=flavour.config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        persistence_threshold=flavour.zero.get("stage3_param_persistence_threshold", 100_000),
        on_freeze=on_freeze,
    )


def check(
    ranks: RankPools,
    name: str,
    world_size: int,
    kind: str,
    embeddings: str,
    on_freeze: str = "keep",
    never: int = 0,
) -> None:
    setup, load = setup_of(ALL[name], world_size, on_freeze), workload(kind, embeddings, never)
    run = {"flavour": name, "kind": kind, "embeddings": embeddings, "on_freeze": on_freeze, "never": never}
    for held in ranks(world_size).run(held_by_stage, **run):
        for stage, measured in enumerate(held):
            predicted = load.model_states(setup, stage)
            assert {key: measured.get(key, 0) for key in STATES} == predicted


@pytest.mark.parametrize("name", FEW)
def test_model_states_are_predicted_to_the_byte(ranks: RankPools, name: str) -> None:
    check(ranks, name, 2, "bert", "always")


@pytest.mark.parametrize(
    ("name", "world_size", "kind", "embeddings", "on_freeze"),
    [
        ("zero2-fp32", 2, "bert", "always", "nf4"),
        ("zero3-bf16", 2, "bert", "first_stage", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *product(["zero1-bf16", "zero3-fp32"], [1, 2], ["bert", "llama"], ["first_stage"], ["int8", "nf4"]),
                *product(["zero0-fp32", "bf16-optimizer", "zero2-offload-fp32"], [2], ["bert"], ["always"], ["nf4"]),
                *product(["zero3-all-persistent", "zero3-all-sharded"], [2], ["llama"], ["never"], ["nf4"]),
            ]
        ),
    ],
)
def test_what_frozen_blocks_hold_quantized_is_predicted(
    ranks: RankPools, name: str, world_size: int, kind: str, embeddings: str, on_freeze: str
) -> None:
    check(ranks, name, world_size, kind, embeddings, on_freeze)


@pytest.mark.parametrize(
    ("name", "on_freeze"),
    [
        ("zero2-fp32", "int8"),
        ("zero3-bf16", "nf4"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(["zero0-fp32", "zero1-bf16", "zero3-fp32", "bf16-optimizer"], ["int8", "nf4"])
        ),
    ],
)
def test_blocks_that_never_train_lie_quantized_from_the_first_stage_on(
    ranks: RankPools, name: str, on_freeze: str
) -> None:
    check(ranks, name, 2, "bert", "first_stage", on_freeze, never=1)


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", ["always", "first_stage", "never"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", FLAVOURS)
def test_model_states_are_predicted_for_every_flavour(
    ranks: RankPools, name: str, world_size: int, kind: str, embeddings: str
) -> None:
    check(ranks, name, world_size, kind, embeddings)
