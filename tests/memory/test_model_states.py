"""Predicted bytes of weights and optimizer state are those that live engines report, to the byte."""

from __future__ import annotations

import pytest

from progtuning_ds.memory import EngineSetup
from tests.engine.flavours import ALL, FLAVOURS, Flavour
from tests.memory.ranks_hold import held_by_stage, workload
from tests.ranks import RankPools

STATES = ("weights", "master_weights", "exp_avg", "exp_avg_sq", "other_state")
FEW = ["zero0-bf16", "zero1-bf16", "zero2-fp32", "zero2-offload-bf16", "zero3-bf16", "bf16-optimizer"]


def setup_of(flavour: Flavour, world_size: int) -> EngineSetup:
    return EngineSetup(
        zero_stage=flavour.stage,
        world_size=world_size,
        precision="bf16" if flavour.mixed else "fp32",
        offload_optimizer=flavour.offload,
        offload_param="offload_param" in flavour.zero,
        fp32_gradients=flavour.config.get("data_types", {}).get("grad_accum_dtype") == "fp32",
        persistence_threshold=flavour.zero.get("stage3_param_persistence_threshold", 100_000),
    )


def check(ranks: RankPools, name: str, world_size: int, kind: str, embeddings: str) -> None:
    setup, load = setup_of(ALL[name], world_size), workload(kind, embeddings)
    for held in ranks(world_size).run(held_by_stage, flavour=name, kind=kind, embeddings=embeddings):
        for stage, measured in enumerate(held):
            predicted = load.model_states(setup, stage)
            assert {key: measured[key] for key in STATES} == {key: predicted[key] for key in STATES}


@pytest.mark.parametrize("name", FEW)
def test_model_states_are_predicted_to_the_byte(ranks: RankPools, name: str) -> None:
    check(ranks, name, 2, "bert", "always")


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", ["always", "first_stage", "never"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", FLAVOURS)
def test_model_states_are_predicted_for_every_flavour(
    ranks: RankPools, name: str, world_size: int, kind: str, embeddings: str
) -> None:
    check(ranks, name, world_size, kind, embeddings)
