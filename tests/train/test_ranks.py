"""What all ranks do together: fail, and average."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import RankPools


def this_rank():
    import torch.distributed as dist

    from progtuning_ds.train.ranks import Ranks

    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def fail_on(bad_rank: int) -> str:
    from progtuning_ds.errors import ConfigError

    ranks = this_rank()

    def work() -> str:
        if ranks.rank == bad_rank:
            raise ConfigError(f"rank {bad_rank} is wrong")
        return "done"

    try:
        return ranks.local_first(work)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_mistake_on_one_rank_is_told_to_all(ranks: RankPools, bad_rank: int) -> None:
    assert ranks(2).run(fail_on, bad_rank=bad_rank) == [f"rank {bad_rank} is wrong"] * 2


def test_without_a_mistake_every_rank_has_the_result(ranks: RankPools) -> None:
    assert ranks(2).run(fail_on, bad_rank=-1) == ["done"] * 2


def means() -> list[float]:
    ranks = this_rank()
    return ranks.mean(torch.tensor([1.0, 1e8 + 1.0]) * (ranks.rank + 1))


def test_means_are_over_ranks_element_by_element(ranks: RankPools) -> None:
    big = [float(torch.tensor(1e8 + 1.0) * (rank + 1)) for rank in range(3)]
    assert ranks(3).run(means) == [[2.0, sum(big) / 3]] * 3


def refused_engine_configs() -> dict[str, str]:
    from progtuning_ds.errors import ConfigError
    from progtuning_ds.train.engine_config import check_engine_config

    base = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    cases = {
        "good": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}},
        "key": {"zero_optimization": {"stag": 2}},
        "value": {"zero_optimization": {"stage": 7}},
        "optimizer": {"optimizer": {"type": "AdamWW"}},
        "torch optimizer": {"optimizer": {"type": "RMSprop"}},
        "scheduler": {"scheduler": {"type": "WarmupDecay"}},
    }
    said = {}
    for name, extra in cases.items():
        try:
            check_engine_config({**base, **extra}, "ds.json")
            said[name] = ""
        except ConfigError as error:
            said[name] = str(error)
    return said


def test_deepspeed_checks_its_own_configuration_in_one_line(ranks: RankPools) -> None:
    said = ranks(2).run(refused_engine_configs)[0]
    assert said["good"] == said["torch optimizer"] == ""
    assert "stag: Extra inputs are not permitted, got 2" in said["key"]
    assert "stage: Input should be" in said["value"]
    assert "optimizer.type must be one of" in said["optimizer"]
    assert "did you mean 'AdamW'?" in said["optimizer"]
    assert "did you mean 'WarmupDecayLR'?" in said["scheduler"]
    assert not any("\n" in line for line in said.values())
