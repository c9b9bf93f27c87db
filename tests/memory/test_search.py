"""The planner's answer against all answers there are."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import (
    Architecture,
    Batch,
    Budget,
    Choice,
    Param,
    ParamTable,
    Request,
    Workload,
    choices,
    divisors,
    fewest_waiting,
    leaving_parts,
    remedies,
    search,
    setup_of,
    stage_cost,
)
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


def stage_answers(choice: Choice, load: Workload, wanted: Request, stage: int) -> list[float]:
    """Cost of every way in which one stage fits: all micro-batches, all numbers of parts whose moments wait."""
    setup, fitting = setup_of(choice, load, wanted), []
    parts = sorted({group.last_stage for group in load.groups(0)})
    counts = range(len(parts) + 1) if choice.host_state else (0,)
    for micro, count in itertools.product(divisors(wanted.rows_per_rank), counts):
        batch = Batch(
            micro,
            wanted.seq_len,
            wanted.rows_per_rank // micro,
            choice.checkpointing,
            wanted.attention,
            wanted.device,
        )
        waiting = tuple(parts[:count])
        footprint = load.footprint(replace(setup, host_parts=waiting), batch, stage)
        host = wanted.budget.host
        if footprint.peak <= wanted.budget.usable and (host is None or footprint.host_total <= host):
            fitting.append(stage_cost(choice, load, wanted, stage, micro, waiting))
    return fitting


def every_answer(load: Workload, wanted: Request) -> list[tuple[float, Choice]]:
    """Least cost of every configuration that fits; stages are independent of each other, so of each its least."""
    found = []
    steps = [len(stage.steps) for stage in load.plan.stages]
    for choice in choices(wanted.kernels):
        options = [stage_answers(choice, load, wanted, stage.index) for stage in load.plan.stages]
        if all(options):
            least = [min(costs) for costs in options]
            found.append((sum(c * n for c, n in zip(least, steps, strict=True)) / sum(steps), choice))
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


@pytest.mark.parametrize("gpus", [1, 2])
def test_no_configuration_that_fits_is_cheaper_where_moments_may_wait(gpus: int) -> None:
    kinds = set()
    for megabytes in range(37, 100, 3):
        wanted = request(gpus=gpus, budget=Budget(megabytes * 10**6), global_batch=4 * gpus, seq_len=64)
        proposal = search(MEDIUM, wanted).proposal
        answers = every_answer(MEDIUM, wanted)
        if proposal is None:
            assert not answers
            continue
        assert proposal.cost == pytest.approx(min(cost for cost, _ in answers))
        kinds.add(proposal.host_state)
    assert kinds == ({"none", "all"} if gpus == 1 else {"none", "lowest_part", "all"})


MEDIUM = llama_shaped(6, 256, 704, 400, 4, 4, stages=3)
THREE = llama_shaped(6, 64, 128, 100, 4, 2, stages=3)


@given(
    stage=st.integers(0, 2),
    zero=st.integers(1, 3),
    gpus=st.sampled_from([1, 2, 3, 8]),
    rows=st.integers(1, 4),
    usable=st.integers(100_000, 6_000_000),
)
@settings(max_examples=80, deadline=None)
def test_each_part_that_waits_lowers_the_peak_and_no_more_wait_than_have_to(
    stage: int, zero: int, gpus: int, rows: int, usable: int
) -> None:
    setup = setup_of(Choice(zero, False, False, False, "deepspeed"), THREE, request(gpus=gpus, global_batch=gpus))
    batch, parts = Batch(rows, 32), leaving_parts(THREE)
    assert parts == (0, 1, 2)
    peaks = [
        THREE.footprint(replace(setup, host_parts=parts[:count]), batch, stage).peak for count in range(len(parts) + 1)
    ]
    assert peaks == sorted(peaks, reverse=True)
    found = fewest_waiting(THREE, replace(setup, host_parts=parts), batch, stage, usable)
    fitting = [count for count, peak in enumerate(peaks) if peak <= usable]
    # Parts that have left hold nothing: whether they are named does not matter.
    wait = [part for part in parts[: fitting[0] if fitting else len(parts)] if part >= stage]
    assert list(found.host_parts) == wait


def test_moments_wait_in_the_first_stage_and_come_home_later() -> None:
    two_gpus = [request(gpus=2, budget=Budget(size * 10**9), seq_len=512, global_batch=64) for size in (50, 65, 70, 75)]
    found = [search(LLAMA_7B, wanted).proposal for wanted in two_gpus]
    assert [one.host_state for one in found if one] == ["none", "all", "lowest_part", "none"]
    offloaded, waiting, lowest, _ = found
    assert offloaded.choice.offload_optimizer
    assert waiting.unoffload
    assert not lowest.unoffload
    assert [stage.host_parts for stage in waiting.stages] == [(0, 1), (), ()]
    assert [stage.host_parts for stage in lowest.stages] == [(0,), (), ()]
    assert lowest.stages[0].footprint.host["exp_avg"] > 0
    assert waiting.setup.host_parts == ()


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
