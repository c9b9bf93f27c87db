"""What must hold of every footprint, whatever the model, the engine and the batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning_ds.memory import CATEGORIES, Batch, EngineSetup, Workload
from tests.memory.test_search import llama_shaped

STATES = CATEGORIES[:5]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    heads = draw(st.sampled_from([1, 2, 4]))
    return llama_shaped(
        blocks=draw(st.integers(3, 7)),
        hidden=heads * draw(st.sampled_from([3, 8, 16])),
        intermediate=draw(st.integers(5, 70)),
        vocab=draw(st.integers(3, 90)),
        heads=heads,
        kv_heads=draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0])),
        stages=draw(st.integers(1, 3)),
        embeddings=draw(st.sampled_from(["always", "first_stage", "never"])),
    )


@st.composite
def setups(draw: st.DrawFn) -> EngineSetup:
    zero = draw(st.integers(0, 3))
    return EngineSetup(
        zero_stage=zero,
        world_size=draw(st.sampled_from([1, 2, 3, 8])),
        precision=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        offload_optimizer=zero > 0 and draw(st.booleans()),
        offload_param=zero == 3 and draw(st.booleans()),
        state_bits=draw(st.sampled_from([32, 8])),
        reduce_bucket=draw(st.integers(1, 5000)),
        persistence_threshold=draw(st.sampled_from([0, 50, 10_000])),
        max_live=draw(st.integers(1, 100_000)),
        prefetch_bucket=draw(st.integers(0, 5000)),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    return Batch(
        micro_batch=draw(st.integers(1, 8)),
        seq_len=draw(st.integers(1, 64)),
        accumulation=draw(st.integers(1, 4)),
        checkpointing=draw(st.booleans()),
        attention=draw(st.sampled_from(["eager", "sdpa", "flash"])),
        device=draw(st.sampled_from(["cuda", "cpu"])),
    )


CASES = settings(max_examples=80, deadline=None)


@given(workloads(), setups(), batches())
@CASES
def test_bytes_are_whole_and_the_peak_is_the_highest_moment(load: Workload, setup: EngineSetup, batch: Batch) -> None:
    for footprint in load.footprints(setup, [batch] * len(load.plan.stages)):
        for held in (*footprint.moments.values(), footprint.host):
            assert all(isinstance(size, int) and size >= 0 for size in held.values())
            assert set(held) <= set(CATEGORIES)
        assert footprint.peak == max(sum(held.values()) for held in footprint.moments.values())


@given(workloads(), setups(), batches())
@CASES
def test_a_later_stage_never_needs_more(load: Workload, setup: EngineSetup, batch: Batch) -> None:
    footprints = load.footprints(setup, [batch] * len(load.plan.stages))
    for earlier, later in pairwise(footprints):
        assert later.peak <= earlier.peak
        assert later.host_total <= earlier.host_total


@given(workloads(), setups(), batches())
@CASES
def test_more_rows_need_more_and_recomputation_keeps_less(load: Workload, setup: EngineSetup, batch: Batch) -> None:
    one = load.footprint(setup, batch, 0)
    assert load.footprint(setup, replace(batch, micro_batch=batch.micro_batch + 1), 0).peak >= one.peak
    kept = [
        load.footprint(setup, replace(batch, checkpointing=on), 0).moments["forward"]["activations"]
        for on in (False, True)
    ]
    blocks = load.params.num_blocks
    # All inputs and one block whole: more than nothing recomputed only where there is hardly anything to recompute.
    assert kept[1] <= kept[0] * (1 + 2 / blocks)


@given(workloads(), setups(), batches())
@CASES
def test_offload_moves_states_and_loses_none(load: Workload, setup: EngineSetup, batch: Batch) -> None:
    if setup.zero_stage == 0:
        return
    at_home = replace(setup, offload_optimizer=False, offload_param=False)
    for stage in load.plan.stages:
        assert load.model_states(at_home, stage.index) == load.model_states(
            replace(at_home, offload_optimizer=True), stage.index
        )


@given(workloads(), batches(), st.sampled_from([2, 4, 8]))
@CASES
def test_more_partitioning_holds_less(load: Workload, batch: Batch, ranks: int) -> None:
    sums = []
    for zero in (0, 1, 3):
        setup = EngineSetup(zero, ranks, persistence_threshold=0)
        sums.append(sum(load.model_states(setup, 0)[name] for name in STATES))
    padding = 64 * ranks * len(load.params.params)
    assert sums[1] <= sums[0] + padding
    assert sums[2] <= sums[1] + padding
    fused = EngineSetup(2, ranks, kernel="fused")
    plain = replace(fused, kernel="deepspeed")
    assert load.footprint(fused, batch, 0).peak <= load.footprint(plain, batch, 0).peak
