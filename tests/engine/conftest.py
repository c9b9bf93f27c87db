"""Runs that several tests look at from different sides are made once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.engine.flavours import ALL, CORE
from tests.engine.ranks_train import MODES, StagedRun, train_staged
from tests.ranks import RankPools

StagedRuns = Callable[..., list[StagedRun]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Flavours that share all their code with one in ``CORE`` are for the slow lane, but for one run of each."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        first = item.nodeid.split("[")[0].endswith("::test_stages_train_as_the_oracle") and params["mode"] == "planned"
        if params.get("mode") and params.get("name") in ALL.keys() - set(CORE) and not first:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def staged_runs(ranks: RankPools) -> StagedRuns:
    """``staged_runs(flavour, mode)``: what two ranks (or ``world_size``) did, through all phases of ``MODES[mode]``."""

    @functools.cache
    def run(
        flavour: str, mode: str, kind: str = "bert", world_size: int = 2, kernel: str = "deepspeed"
    ) -> list[StagedRun]:
        phases, groups = MODES[mode]
        return ranks(world_size).run(
            train_staged, flavour=flavour, kind=kind, phases=phases, groups=groups, kernel=kernel
        )

    return run
