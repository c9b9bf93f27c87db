"""The harness itself: results, failures of each kind, recovery."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.ranks import RankFailure, RankPools


def sum_over_ranks(add: int = 0) -> tuple[int, float]:
    import deepspeed.comm as dist
    import torch
    from deepspeed.accelerator import get_accelerator

    value = torch.tensor([float(dist.get_rank() + add)], device=get_accelerator().current_device_name())
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def fail_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        print("said before the failure")
        raise KeyError("the reason")
    dist.barrier()


def hang_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        time.sleep(600)


def die_on(rank: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def return_unpicklable() -> object:
    return lambda: None


def leave_an_engine_behind() -> int:
    import deepspeed
    import torch

    model = torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.keep = engine  # a cycle, as closures over engines make them
    for _ in range(3):
        engine.backward(engine(torch.ones(1, 4, device=engine.device)).sum())
        engine.step()
    return count_engines()


def count_engines() -> int:
    import gc

    from deepspeed.runtime.engine import DeepSpeedEngine

    return sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects())


@pytest.fixture(scope="module")
def own_ranks() -> Iterator[RankPools]:
    """Pools to break, so that the shared ones stay alive."""
    pools = RankPools()
    yield pools
    pools.close()


def test_every_rank_answers_in_rank_order(ranks: RankPools) -> None:
    assert ranks(2).run(sum_over_ranks, add=1) == [(0, 3.0), (1, 3.0)]


def test_ranks_stay_alive_between_calls(ranks: RankPools) -> None:
    first, second = (ranks(2).run(process_id) for _ in range(2))
    assert first == second
    assert len(set(first)) == 2


def process_id() -> int:
    return os.getpid()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (fail_on, "rank 1 of 2 failed in .*fail_on: KeyError: 'the reason'"),
        (hang_on, r"no answer from rank\(s\) \[1\] of 2 within 3 s in .*hang_on"),
        (die_on, "rank 1 of 2 failed in .*die_on: the process died with exit code 7"),
    ],
    ids=["raises", "hangs", "dies"],
)
def test_a_failing_rank_is_named_at_once_and_the_next_call_works(own_ranks: RankPools, function, says) -> None:
    pool = own_ranks(2)
    start = time.monotonic()
    with pytest.raises(RankFailure, match=says) as caught:
        pool.run(function, rank=1, timeout=3 if function is hang_on else 60)
    assert time.monotonic() - start < 10
    if function is fail_on:
        assert "said before the failure" in str(caught.value)
        assert "rank 0: still running" in str(caught.value)
        assert "barrier" in str(caught.value), "the stack of the rank that waits is shown"
    if function is hang_on:
        assert "in hang_on" in str(caught.value), "the stack of the rank that hangs is shown"
    with pytest.raises(RuntimeError, match="this pool is closed"):
        pool.run(sum_over_ranks)
    assert own_ranks(2).run(sum_over_ranks) == [(0, 1.0), (1, 1.0)]


def test_a_result_that_cannot_be_pickled_is_a_failure_not_a_hang(own_ranks: RankPools) -> None:
    with pytest.raises(RankFailure, match="pickle"):
        own_ranks(1).run(return_unpicklable)


def test_local_functions_are_refused(ranks: RankPools) -> None:
    with pytest.raises(ValueError, match="top-level functions only"):
        ranks(2).run(lambda: None)


def test_engines_of_one_test_are_gone_in_the_next(ranks: RankPools) -> None:
    assert ranks(2).run(leave_an_engine_behind) == [1, 1]
    assert ranks(2).run(count_engines) == [0, 0]
