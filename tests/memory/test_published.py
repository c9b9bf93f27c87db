"""Figures that others have published, from the same formulas; the source stands beside each."""

from __future__ import annotations

import pytest

from progtuning_ds.memory import Batch, Budget, EngineSetup, Param, ParamTable, Request, Workload, search
from progtuning_ds.schedule import plan_stages
from tests.memory.test_search import LLAMA_7B, llama_shaped

STATES = ("weights", "master_weights", "exp_avg", "exp_avg_sq")


def one_stage(numel: int) -> Workload:
    """A model of so many parameters in ten blocks, nothing frozen."""
    params = tuple(Param(f"w{block}", numel // 10, block) for block in range(10))
    return Workload(ParamTable(params, 10), None, plan_stages(10, 1, 1))


def states(zero_stage: int, ranks: int, numel: int) -> float:
    """Gigabytes (10^9) of weights, gradients and optimizer state on a rank."""
    load = one_stage(numel)
    setup = EngineSetup(zero_stage, ranks, reduce_bucket=1, prefetch_bucket=1, max_live=1)
    held = load.model_states(setup, 0)
    element = 2 / ranks if zero_stage >= 2 else 2
    return (sum(held[name] for name in STATES) + element * numel) / 1e9


@pytest.mark.parametrize(("zero_stage", "published"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_paper_figure_1(zero_stage: int, published: float) -> None:
    """ZeRO, arXiv 1910.02054, figure 1: 7.5B parameters on 64 GPUs, 2 + 2 + 12 bytes each before partitioning."""
    assert states(zero_stage, 64, 7_500_000_000) == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(
    ("billions", "zero_stage", "ranks", "published"),
    [(128, 3, 1024, 2.0), (128, 2, 64, 284.0), (7.5, 1, 1024, 30.1), (1000, 3, 1024, 15.6)],
)
def test_zero_paper_table_1(billions: float, zero_stage: int, ranks: int, published: float) -> None:
    """ZeRO, arXiv 1910.02054, table 1: gigabytes of model states per GPU by degree of data parallelism."""
    assert states(zero_stage, ranks, int(billions * 1e9)) == pytest.approx(published, rel=0.01)


def fits(gpus: int, gigabytes: int, **changes: object) -> bool:
    wanted = {"seq_len": 512, "global_batch": 64, **changes}
    load = llama_shaped(32, 4096, 11008, 32000, 32, 32, stages=1)
    return search(load, Request(gpus, Budget(gigabytes * 10**9, reserve=2 * 10**9), **wanted)).proposal is not None


def test_full_fine_tuning_of_7b_fits_where_it_is_known_to() -> None:
    """Alpaca (github.com/tatsu-lab/stanford_alpaca) fine-tuned LLaMA-7B wholly on four A100 of 80 GB, 512 tokens."""
    assert fits(4, 80)


def test_full_fine_tuning_of_7b_does_not_fit_on_one_gpu_without_offload() -> None:
    """16 bytes x 6.7e9 = 107 GB of model states (ZeRO's accounting): no single 80 GB GPU holds them."""
    load = llama_shaped(32, 4096, 11008, 32000, 32, 32, stages=1)
    setup = EngineSetup(2, 1)
    assert load.params.numel == 6_738_415_616
    footprint = load.footprint(setup, Batch(1, 512, accumulation=64, checkpointing=True), 0)
    assert footprint.peak > 80e9
    held = load.model_states(setup, 0)
    assert sum(held[name] for name in STATES) + 2 * load.params.numel == pytest.approx(107.8e9, rel=0.01)


def test_lora_of_7b_fits_on_one_24_gb_gpu() -> None:
    """LoRA, arXiv 2106.09685: no optimizer state for the base; 13.5 GB of bf16 weights leave room on 24 GB."""
    adapted = Workload(LLAMA_7B.params.with_adapters(LLAMA_7B.shape, 16), LLAMA_7B.shape, LLAMA_7B.plan)
    trained = sum(p.numel for p in adapted.params.params if not p.frozen)
    assert trained == pytest.approx(40e6, rel=0.01)  # rank 16 on all linear layers of LLaMA-7B
    assert search(adapted, Request(1, Budget(24 * 10**9, 0, 2 * 10**9), 512, 16)).proposal is not None
