"""Figures that others have published, from the same formulas; the source stands beside each."""

from __future__ import annotations

import pytest

from progtuning_ds.memory import Batch, Budget, EngineSetup, Param, ParamTable, Proposal, Request, Workload, search
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


FIGURE_1 = [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)]


@pytest.mark.parametrize(("zero_stage", "published"), FIGURE_1)
def test_zero_paper_figure_1(zero_stage: int, published: float) -> None:
    """ZeRO, https://arxiv.org/abs/1910.02054, figure 1: 7.5B parameters, 64 GPUs, 2 + 2 + 12 bytes each undivided."""
    assert states(zero_stage, 64, 7_500_000_000) == pytest.approx(published, abs=0.06)


TABLE_1 = {
    # parameters in billions: degree of data parallelism: ZeRO-1, 2, 3 (P_os, P_os+g, P_os+g+p)
    7.5: {4: (52.5, 41.3, 30), 16: (35.6, 21.6, 7.5), 64: (31.4, 16.6, 1.88), 1024: (30.1, 15.1, 0.12)},
    128: {4: (896, 704, 512), 16: (608, 368, 128), 64: (536, 284, 32), 1024: (513, 257, 2)},
    1000: {4: (7000, 5500, 4000), 64: (4187, 2218, 250), 256: (4046, 2054, 62.5), 1024: (4011, 2013, 15.6)},
}


@pytest.mark.parametrize(("billions", "ranks"), [(size, ranks) for size, row in TABLE_1.items() for ranks in row])
def test_zero_paper_table_1(billions: float, ranks: int) -> None:
    """ZeRO, https://arxiv.org/abs/1910.02054, table 1: gigabytes of model states on each of so many GPUs."""
    for zero_stage, published in enumerate(TABLE_1[billions][ranks], start=1):
        # The paper rounds most entries and cuts the digits behind the point of some large ones.
        last_digit = 1 if published > 100 else 0.06
        assert published - 0.06 <= states(zero_stage, ranks, int(billions * 1e9)) < published + last_digit


def proposed(gpus: int, gigabytes: int, **changes: object) -> Proposal | None:
    wanted = {"seq_len": 512, "global_batch": 64, **changes}
    load = llama_shaped(32, 4096, 11008, 32000, 32, 32, stages=1)
    return search(load, Request(gpus, Budget(gigabytes * 10**9, reserve=2 * 10**9), **wanted)).proposal


def test_full_fine_tuning_of_7b_fits_where_it_is_known_to() -> None:
    """LLaMA-7B, wholly, in bf16, on 4 A100 of 80 GB, fully sharded, no offload; at most 512 tokens, 128 rows a step.

    https://github.com/tatsu-lab/stanford_alpaca, README, section Fine-tuning.
    """
    proposal = proposed(4, 80, global_batch=128)
    assert proposal is not None
    assert not proposal.choice.offload_optimizer
    assert all(stage.micro_batch >= 4 for stage in proposal.stages)  # as there, --per_device_train_batch_size


def test_full_fine_tuning_of_7b_does_not_fit_on_one_gpu_without_offload() -> None:
    """16 bytes x 6.7e9 = 107 GB of model states (ZeRO's accounting): no single 80 GB GPU holds them."""
    load = llama_shaped(32, 4096, 11008, 32000, 32, 32, stages=1)
    setup = EngineSetup(2, 1)
    assert load.params.numel == 6_738_415_616
    footprint = load.footprint(setup, Batch(1, 512, accumulation=64, checkpointing=True), 0)
    assert footprint.peak > 80e9
    held = load.model_states(setup, 0)
    assert sum(held[name] for name in STATES) + 2 * load.params.numel == pytest.approx(107.8e9, rel=0.01)


def with_lora(rank: int) -> Workload:
    return Workload(LLAMA_7B.params.with_adapters(LLAMA_7B.shape, rank), LLAMA_7B.shape, LLAMA_7B.plan)


def test_lora_of_7b_fits_on_one_24_gb_gpu() -> None:
    """LLaMA-7B with LoRA on a single GPU of 24 GB.

    https://github.com/Lightning-AI/lit-llama/blob/main/howto/finetune_lora.md
    """
    proposal = search(with_lora(8), Request(1, Budget(24 * 10**9, 0, 2 * 10**9), 256, 128)).proposal
    assert proposal is not None
    assert not proposal.choice.offload_optimizer


def test_lora_has_as_many_parameters_as_peft_gives_it() -> None:
    """PEFT itself, on a LLaMA-7B without weights; rank x (inputs + outputs) of each layer (arXiv 2106.09685)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig()), LoraConfig(r=16, target_modules="all-linear"))
    trained, everything = model.get_nb_trainable_parameters()
    params = with_lora(16).params
    assert trained == sum(param.numel for param in params.params if not param.frozen) == 39_976_960
    assert everything == params.numel
