"""SIGKILL anywhere: the job ends at once, and the same command with `--resume auto` reaches the same result."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from progtuning_ds.train.outcome import PEER_LOST
from tests.faults.conftest import Bench
from tests.faults.launch import launch
from tests.faults.trap import Kill, points
from tests.train.test_resume import same_results

SEEDS = 60
FLAVOURS = ("zero2", "zero3", "zero1")
ON_ONE_RANK = ("before the manifest", "between write and rename", "between rename and latest", "after latest")
ON_ONE_RANK += ("rotation", "half a rotation")
QUICK = [
    ("zero2", "half an engine step", 5, (1,)),
    ("zero2", "half a retarget", 1, (0, 1)),
    ("zero2", "between write and rename", 2, (0,)),
    pytest.param("zero2", "between files", 3, (1,), marks=pytest.mark.slow),
]


def survive(bench: Bench, folder: Path, deepspeed: str, *kills: Kill, options: tuple[str, ...] = ()) -> None:
    """Kill, and kill again, then go on to the end; compare with the run that nothing happened to."""
    arguments = bench.arguments(folder / "run", deepspeed, "--resume", "auto", *options)
    for number, kill in enumerate(kills):
        ended = launch(arguments, folder, kill=kill)
        dead = [rank for rank in range(2) if ended.codes[rank] == -9]
        assert dead == sorted(kill.ranks), (number, kill, ended)
        for rank in {0, 1} - set(kill.ranks):
            assert ended.codes[rank] == PEER_LOST, (kill, ended)
            assert f"error: rank {rank} stops: rank {kill.ranks[0]} (process" in ended.said
        assert ended.lasted < 15, "the survivors end promptly"
    ended = launch(arguments, folder)
    assert ended.codes == (0, 0), ended.said
    same_results(folder / "run", bench.whole(deepspeed).folder)
    left = [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left, "nothing half done stays behind"


@pytest.mark.parametrize(("deepspeed", "point", "nth", "who"), QUICK)
def test_a_killed_run_goes_on_to_the_same_result(
    bench: Bench, tmp_path: Path, deepspeed: str, point: str, nth: int, who: tuple[int, ...]
) -> None:
    assert bench.whole(deepspeed).passages[point] >= nth, "the point is passed that often"
    survive(bench, tmp_path, deepspeed, Kill(point, nth, who))


def draw(seed: int, bench: Bench) -> tuple[str, Kill]:
    """A flavour, a point, a passage and the ranks it happens to."""
    rng = random.Random(seed)
    deepspeed = FLAVOURS[seed % len(FLAVOURS)]
    passages = bench.whole(deepspeed).passages
    point = rng.choice(sorted(points()))
    who = (0,) if point in ON_ONE_RANK else rng.choice([(0,), (1,), (0, 1)])
    return deepspeed, Kill(point, rng.randint(1, passages[point]), who)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_killed_at_random_goes_on_to_the_same_result(bench: Bench, tmp_path: Path, seed: int) -> None:
    deepspeed, kill = draw(seed, bench)
    survive(bench, tmp_path, deepspeed, kill)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "nth", "who"),
    [
        ("between write and sync", 14, (0,)),
        ("between write and sync", 9, (1,)),
        ("between files", 5, (0,)),
        ("between files", 5, (1,)),
        ("between files", 5, (0, 1)),
        ("before the manifest", 3, (0,)),
        ("forward", 13, (0,)),
        ("forward", 13, (1,)),
        ("forward", 13, (0, 1)),
    ],
)
def test_a_run_killed_while_it_saves_in_the_background_goes_on(
    bench: Bench, tmp_path: Path, point: str, nth: int, who: tuple[int, ...]
) -> None:
    """A later save is under way, or a forward pass beside it."""
    survive(bench, tmp_path, "zero2", Kill(point, nth, who), options=("checkpoint.asynchronous=true",))


@pytest.mark.slow
def test_a_run_killed_again_and_again_gets_there(bench: Bench, tmp_path: Path) -> None:
    kills = [Kill("half an engine step", 4, (0,)), Kill("between rename and latest", 2, (0,)), Kill("forward", 3, (1,))]
    survive(bench, tmp_path, "zero2", *kills)


def test_every_point_is_passed(bench: Bench) -> None:
    passages = bench.whole("zero2").passages
    assert {name for name in points() if not passages.get(name)} == set()
