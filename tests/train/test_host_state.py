"""Moments that wait in host memory: the device gets their room, DeepSpeed's functions see them, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.bytes_held import DeviceMemory
from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import build_staged, optimizer_step, read_state
from tests.engine.reference import Run
from tests.faults.conftest import Bench, bench  # noqa: F401 - a fixture
from tests.faults.launch import launch
from tests.faults.trap import Kill
from tests.ranks import RankPools
from tests.train.test_resume import same_results

MARGIN = 2 * 2**20
WAITING = ((0, 1), (1, 2), ())  # in each stage: part 2 is `always`, which leaves last


def states_seen(flavour: str, wait: bool) -> list[dict[str, torch.Tensor]]:
    """What ``safe_get_full_*`` reads after each boundary and after each step."""
    from progtuning_ds.train.host_state import HostMoments

    phases = shrinking(steps=2)
    engine, stages = build_staged(ALL[flavour], phases, "plan")
    away = HostMoments(stages.adapter, len(phases))
    seen = []

    def look() -> None:
        run = Run()
        read_state(engine, run)
        seen.append(
            {f"{name} {kind}": value for kind in ("exp_avg", "exp_avg_sq") for name, value in vars(run)[kind].items()}
        )

    for step in range(2 * len(phases)):
        stages.advance(step)
        if step % 2 == 0:
            away.keep_away(WAITING[step // 2] if wait else ())
        if step:
            look()
        optimizer_step(engine, "bert", step)
        look()
    assert (away.waiting_bytes() > 0) == (wait and WAITING[-1] != ())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1-bf16", "zero2-fp32", "bf16-optimizer", "zero3-fp32"])
def test_deepspeed_reads_the_moments_wherever_they_are(ranks: RankPools, name: str) -> None:
    here, away = (ranks(2).run(states_seen, flavour=name, wait=wait) for wait in (False, True))
    for one, other in zip(here[0], away[0], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def room_gained(flavour: str) -> tuple[int, int]:
    """Bytes of moments that wait, bytes this process gained by that."""
    from progtuning_ds.train.host_state import HostMoments

    engine, stages = build_staged(ALL[flavour], shrinking(steps=1), "plan", "wide")
    away = HostMoments(stages.adapter, 3)
    for step in range(2):  # the second step has all its buffers
        optimizer_step(engine, "wide", step)
    held = []
    for parts in ((), (0, 1, 2)):
        away.keep_away(parts)
        optimizer_step(engine, "wide", 2)
        DeviceMemory.reset()
        held.append(DeviceMemory.read().now)
    return away.waiting_bytes(), held[0] - held[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-fp32", "bf16-optimizer", "zero3-bf16"])
def test_the_room_of_moments_that_wait_is_free(ranks: RankPools, name: str) -> None:
    for waiting, gained in ranks(2).run(room_gained, flavour=name):
        assert waiting > 10 * MARGIN
        assert gained == pytest.approx(waiting, abs=MARGIN)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("host_state", ["lowest_part", "all"])
def test_a_killed_run_whose_moments_wait_goes_on_to_the_same_result(
    bench: Bench,  # noqa: F811
    tmp_path: Path,
    deepspeed: str,
    host_state: str,
) -> None:
    arguments = bench.arguments(tmp_path / "run", deepspeed, f"memory.host_state={host_state}", "--resume", "auto")
    for nth in (4, 12):  # inside the first stage, whose moments wait, and inside a later one
        killed = launch(arguments, tmp_path, kill=Kill("backward", nth, (0, 1)))
        assert killed.codes == (-9, -9), killed.said
    ended = launch(arguments, tmp_path)
    assert ended.codes == (0, 0), ended.said
    same_results(tmp_path / "run", bench.whole(deepspeed).folder)
