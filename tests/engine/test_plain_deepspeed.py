"""DeepSpeed alone, nothing frozen, agrees with the oracle: so what differs later is ours."""

from __future__ import annotations

import pytest

from tests.engine.agreement import assert_agree, oracle, tolerance_for
from tests.engine.flavours import FLAVOURS, HALF_PRECISION
from tests.engine.problem import Phase
from tests.engine.ranks_train import ALL_BLOCKS, train_plain
from tests.ranks import RankPools

EVERYTHING = (Phase(6, ALL_BLOCKS),)


@pytest.mark.parametrize("name", [*FLAVOURS, *(pytest.param(name, marks=pytest.mark.gpu) for name in HALF_PRECISION)])
def test_plain_deepspeed_trains_as_the_oracle(ranks: RankPools, name: str) -> None:
    numerics = (FLAVOURS | HALF_PRECISION)[name].numerics
    pool = ranks(2)
    runs = pool.run(train_plain, flavour=name, kind="bert", phases=EVERYTHING)
    expected = oracle("bert", EVERYTHING, 2, numerics, pool.device)
    assert_agree(runs, expected, tolerance_for(numerics))
