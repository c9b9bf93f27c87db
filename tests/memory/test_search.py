"""The planner's answer against all answers there are."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import Architecture, Batch, Budget, Param, ParamTable, Request, Workload, search
from progtuning_ds.memory.search import choices, divisors, remedies, setup_of, stage_cost
from progtuning_ds.schedule import plan_stages


def llama_shaped(
    blocks: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    heads: int,
    kv_heads: int,
    stages: int = 3,
    embeddings: str = "always",
) -> Workload:
    shape = Architecture(
        num_blocks=blocks,
        hidden=hidden,
        heads=heads,
        head_dim=hidden // heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        vocab=vocab,
        norm="rmsnorm",
        norm_first=True,
        mlp="gated",
        softmax_fp32=True,
    )
    key = hidden // heads * kv_heads
    matrices = (hidden * hidden, hidden * key, hidden * key, hidden * hidden, *[hidden * intermediate] * 3)
    params = [Param("embed", vocab * hidden, "embeddings")]
    for block in range(blocks):
        params += [Param(f"{block}.m{i}", numel, block) for i, numel in enumerate(matrices)]
        params += [Param(f"{block}.n{i}", hidden, block, decays=False) for i in range(2)]
    params += [Param("norm", hidden, "head", decays=False), Param("lm_head", vocab * hidden, "head")]
    return Workload(ParamTable(tuple(params), blocks), shape, plan_stages(blocks, stages, stages, embeddings))


SMALL = llama_shaped(4, 64, 128, 100, 4, 2, stages=2)
LLAMA_7B = llama_shaped(32, 4096, 11008, 32000, 32, 32)


def request(**changes: object) -> Request:
    values = {"gpus": 2, "budget": Budget(2**30), "seq_len": 32, "global_batch": 8}
    return Request(**{**values, **changes})


def every_answer(load: Workload, wanted: Request) -> list[tuple[float, object]]:
    """Cost of every configuration that fits, all micro-batches of all stages tried."""
    found = []
    for choice in choices(wanted.kernels):
        setup = setup_of(choice, load, wanted)
        options = []
        for stage in load.plan.stages:
            fitting = []
            for micro in divisors(wanted.rows_per_rank):
                batch = Batch(
                    micro,
                    wanted.seq_len,
                    wanted.rows_per_rank // micro,
                    choice.checkpointing,
                    wanted.attention,
                    wanted.device,
                )
                footprint = load.footprint(setup, batch, stage.index)
                host = wanted.budget.host
                if footprint.peak <= wanted.budget.usable and (host is None or footprint.host_total <= host):
                    fitting.append(stage_cost(choice, load, wanted, stage.index, micro))
            options.append(fitting)
        steps = [len(stage.steps) for stage in load.plan.stages]
        for combination in itertools.product(*options):
            mean = sum(c * n for c, n in zip(combination, steps, strict=True)) / sum(steps)
            found.append((mean, choice))
    return found


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("kernels", [("deepspeed",), ("deepspeed", "fused")])
@pytest.mark.parametrize("host", [None, 2**20])
def test_no_configuration_that_fits_is_cheaper(gpus: int, kernels: tuple[str, ...], host: int | None) -> None:
    fits, fails = 0, 0
    for kilobytes in (*range(500, 6000, 250), 8000, 12000, 20000, 50000):
        wanted = request(gpus=gpus, budget=Budget(kilobytes * 1000, host), kernels=kernels)
        answers = every_answer(SMALL, wanted)
        proposal = search(SMALL, wanted).proposal
        if proposal is None:
            assert not answers
            fails += 1
        else:
            assert proposal.cost == pytest.approx(min(cost for cost, _ in answers))
            assert all(stage.footprint.peak <= wanted.budget.usable for stage in proposal.stages)
            fits += 1
    assert fits
    assert fails


def test_more_memory_is_never_slower_and_less_never_faster() -> None:
    costs = []
    for gigabytes in (10, 16, 24, 40, 48, 80, 141):
        proposal = search(
            LLAMA_7B, request(gpus=8, budget=Budget(gigabytes * 10**9), seq_len=2048, global_batch=64)
        ).proposal
        costs.append(proposal.cost if proposal else float("inf"))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("gpus", [1, 4, 64, 1024])
def test_from_100_million_to_100_billion_parameters_in_seconds(gpus: int) -> None:
    sizes = [(12, 768, 3072, 50000, 12, 12), (32, 4096, 11008, 32000, 32, 32), (96, 9216, 36864, 128256, 72, 8)]
    began = time.process_time()
    for size in sizes:
        load = llama_shaped(*size)
        wanted = request(gpus=gpus, budget=Budget(80 * 10**9), seq_len=4096, global_batch=1024)
        if search(load, wanted).proposal is None:
            list(remedies(load, wanted))
    assert load.params.numel > 100e9
    assert time.process_time() - began < 20


def test_what_does_not_fit_is_explained_and_remedied() -> None:
    wanted = request(gpus=1, budget=Budget(16 * 10**9, host=32 * 10**9), seq_len=2048, global_batch=8)
    outcome = search(LLAMA_7B, wanted)
    assert outcome.proposal is None
    assert len(outcome.failures) == len(choices())
    assert {failure.where for failure in outcome.failures} == {"device", "host"}
    for failure in outcome.failures:
        assert failure.missing > 0
        assert failure.largest[1] > 0
    words = [remedy.words for remedy in remedies(LLAMA_7B, wanted)]
    assert any("GPUs instead of 1" in text for text in words)
    assert any("LoRA" in text for text in words)


@given(
    gpus=st.integers(1, 8),
    rows=st.integers(1, 12),
    megabytes=st.integers(1, 60),
    seq_len=st.sampled_from([8, 32, 128]),
    embeddings=st.sampled_from(["always", "first_stage", "never"]),
)
@settings(max_examples=60, deadline=None)
def test_a_proposal_keeps_its_promises(gpus: int, rows: int, megabytes: int, seq_len: int, embeddings: str) -> None:
    load = llama_shaped(6, 64, 192, 200, 4, 4, stages=3, embeddings=embeddings)
    wanted = request(gpus=gpus, budget=Budget(megabytes * 10**6), seq_len=seq_len, global_batch=gpus * rows)
    proposal = search(load, wanted).proposal
    if proposal is None:
        return
    assert len(proposal.stages) == 3
    for stage in proposal.stages:
        assert stage.micro_batch * stage.accumulation * gpus == wanted.global_batch
        assert stage.footprint.peak <= wanted.budget.usable


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 0}, "gpus must be a positive whole number, got 0"),
        ({"gpus": 2048, "global_batch": 2048}, "gpus must be within 1..1024, got 2048"),
        ({"gpus": 3, "global_batch": 8}, "multiple of the 3 GPUs, got 8; nearest: 6 or 9"),
        ({"attention": "flsh"}, "attention must be one of eager, sdpa, flash, got 'flsh'; did you mean 'flash'?"),
        ({"precision": "bf61"}, "did you mean 'bf16'?"),
    ],
)
def test_a_wrong_request_gets_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?").replace(".", r"\.")):
        request(**changes)
