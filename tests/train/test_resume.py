"""A run that was stopped goes on as if it had not been: records, metrics and the exported model are the same."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.train.records import (
    CheckpointRecord,
    EvaluationRecord,
    RunRecord,
    SessionRecord,
    StageRecord,
    StepRecord,
    read_records,
)
from tests.ranks import RankPools
from tests.train import tiny
from tests.train.test_run import settings

STEPS = 10  # two epochs of five, which are two stages


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("sources"), 58, 23, dropout=0.1)


@pytest.fixture(scope="module")
def uninterrupted(ranks: RankPools, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks(2).run(run, given=settings(sources, folder))
    return folder


def run(
    given: dict[str, Any], resume: str = "never", signal_at: int | None = None, nan_at: tuple[int, ...] = ()
) -> str | None:
    """Run the program on this rank; returns what ended it early, in words.

    Args:
        given: the configuration.
        resume: as on the command line.
        signal_at: the last rank gets SIGUSR1 in this step.
        nan_at: the loss is not finite in these steps, counted over the life of this process group.
    """
    import torch.distributed as dist

    from progtuning_ds.config import run_config
    from progtuning_ds.errors import CheckpointError, ConfigError
    from progtuning_ds.train import loop
    from progtuning_ds.train.outcome import RunEndError
    from progtuning_ds.train.program import run_program
    from progtuning_ds.train.quiet import quiet_libraries

    config = run_config({**given, "logging": {**given["logging"], "plot": False}})
    quiet_libraries(config.logging)
    train_step = loop.TrainingLoop._train_step
    left = list(nan_at)

    def with_trouble(self: Any, step: int, *rest: Any) -> None:
        if step == signal_at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        train_step(self, step, *rest)
        if step in left:
            left.remove(step)
            self._pending[-1].loss *= float("nan")

    loop.TrainingLoop._train_step = with_trouble  # type: ignore[method-assign]
    try:
        run_program(config, resume=resume)
    except (RunEndError, ConfigError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.TrainingLoop._train_step = train_step  # type: ignore[method-assign]
    return None


def same_results(one: Path, other: Path) -> None:
    """What a run computed, without what it took."""
    assert [(r.step, r.loss, r.learning_rate, r.grad_norm) for r in read_records(one, StepRecord)] == [
        (r.step, r.loss, r.learning_rate, r.grad_norm) for r in read_records(other, StepRecord)
    ]
    for kind in (EvaluationRecord, StageRecord):
        ours, theirs = ([(r.stage, r.metrics) for r in read_records(folder, kind)] for folder in (one, other))
        assert ours == theirs, kind
    assert [r.metrics for r in read_records(one, RunRecord)] == [r.metrics for r in read_records(other, RunRecord)]
    weights = sorted((one / "final").glob("*.safetensors"))
    assert weights
    for path in weights:
        assert path.read_bytes() == (other / "final" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("at", "asynchronous"),
    [(2, False), (4, True)],
    ids=["mid-stage", "where-an-evaluation-is-due-and-in-the-background"],
)
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_to_the_bit(
    ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path, at: int, asynchronous: bool
) -> None:
    given = settings(sources, tmp_path / "run", checkpoint={"every_steps": 2, "asynchronous": asynchronous})
    said = ranks(2).run(run, given=given, signal_at=at)
    assert said == [said[0]] * 2
    assert said[0].startswith(f"PreemptedError: stopped by SIGUSR1 after step {at + 1} of {STEPS}; the run is saved")
    assert not (tmp_path / "run" / "final").exists()
    assert ranks(2).run(run, given=given, resume="auto") == [None, None]
    same_results(tmp_path / "run", uninterrupted)
    sessions = read_records(tmp_path / "run", SessionRecord)
    assert [(record.reason, record.step) for record in sessions] == [("start", 0), ("resume", at + 1)]
    assert ranks(2).run(run, given=given, resume="auto") == [None, None], "a complete run is left alone"
    assert len(read_records(tmp_path / "run", SessionRecord)) == 2
    saved = [record.step for record in read_records(tmp_path / "run", CheckpointRecord)]
    assert saved == sorted({2, 4, at + 1, 5, 6, 8, 10}), "each once, the ones in the background too"


def test_records_of_steps_that_are_done_again_are_not_kept_twice(
    ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """As after a kill: steps were recorded beyond the last checkpoint, the last line only half."""
    given = settings(sources, tmp_path / "run", checkpoint={"every_steps": 3})
    ranks(2).run(run, given=given, signal_at=6)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.remove_all_but({3})
    with (tmp_path / "run" / "steps.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    ranks(2).run(run, given=given, resume="auto")
    same_results(tmp_path / "run", uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    given = settings(sources, tmp_path / "run", checkpoint={"every_steps": 2, "keep_last": 3})
    ranks(2).run(run, given=given, signal_at=6)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.steps() == [7, 6, 5]
    (store.path(7) / "rank-00001.safetensors").unlink()
    os.truncate(store.path(6) / "rank-00000.safetensors", 1000)
    assert ranks(2).run(run, given=given, resume="auto") == [None, None]
    same_results(tmp_path / "run", uninterrupted)
    session = read_records(tmp_path / "run", SessionRecord)[-1]
    assert session.step == 5
    assert "step-00000007 is damaged: rank-00001.safetensors is missing" in session.message
    assert "step-00000006 is damaged: rank-00000.safetensors has 1000 bytes instead of" in session.message


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    given = settings(sources, tmp_path / "run")
    ranks(2).run(run, given=given, signal_at=1)
    path = CheckpointStore(tmp_path / "run" / "checkpoints").path(2) / "state.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = ranks(2).run(run, given=given, resume="auto")
    assert said[0].startswith("CheckpointError: checkpoint ")
    assert said[0].endswith("step-00000002 is damaged: state.json does not have its checksum")
    assert len(read_records(tmp_path / "run", StepRecord)) == 2, "its records are still there"


def test_a_run_goes_on_with_the_settings_it_began_with_on_other_ranks_and_stages(
    ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    plain = settings(sources, tmp_path / "plain", model={"path": str(no_dropout(sources))})
    other = settings(sources, tmp_path / "run", model=plain["model"])
    ranks(2).run(run, given=plain)
    ranks(2).run(run, given=other, signal_at=3)
    fewer = {**other, "train": {**other["train"], "micro_batch_size": 4}, "deepspeed": "zero3"}
    wrong = {**fewer, "train": {**fewer["train"], "learning_rate": 1e-3}}
    assert ranks(1).run(run, given=wrong, resume="auto") == [
        f"ConfigError: train.learning_rate is 0.001 now and 0.005 in {tmp_path / 'run' / 'config.yaml'}; "
        f"a run goes on with the settings it began with"
    ]
    assert ranks(1).run(run, given=fewer, resume="auto") == [None]
    ours, theirs = (
        [record.loss for record in read_records(folder, StepRecord)]
        for folder in (tmp_path / "run", tmp_path / "plain")
    )
    assert ours == pytest.approx(theirs, abs=2e-5)


def losses(folder: Path) -> list[float]:
    return [record.loss for record in read_records(folder, StepRecord)]


def no_dropout(sources: Path) -> Path:
    folder = sources / "plain-model"
    return folder if folder.exists() else tiny.save_model(folder)


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(
        sources,
        tmp_path / "run",
        train={"epochs": 4},
        schedule={"num_stages": 2},
        checkpoint={"every_steps": 3, "keep_last": 2, "keep_best": 1},
    )
    ranks(2).run(run, given=given)
    folder = tmp_path / "run"
    made = [record.step for record in read_records(folder, CheckpointRecord)]
    assert made == [3, 5, 6, 9, 10, 12, 15, 18, 20]
    scores = {record.step + 1: record.metrics["accuracy"] for record in read_records(folder, EvaluationRecord)}
    best = max(scores, key=lambda step: (scores[step], step))
    assert set(CheckpointStore(folder / "checkpoints").steps()) == {20, 18, best}


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_look_at(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    given = settings(sources, tmp_path / "run", logging={"steps": 4, "progress": "off"})
    said = ranks(2).run(run, given=given, nan_at=(5,))
    assert said[0] == said[1]
    assert said[0].startswith("GuardStopError: the loss of step 6 is nan; look at the learning rate (")
    assert said[0].endswith("stopped, the checkpoint after step 5 is good")
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [5]


def test_a_rollback_goes_on_from_the_last_checkpoint_with_a_lower_rate(
    ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    given = settings(
        sources,
        tmp_path / "run",
        guard={"action": "rollback", "max_rollbacks": 2},
        logging={"steps": 1, "progress": "off"},
    )
    assert ranks(2).run(run, given=given, nan_at=(7, 8)) == [None, None]
    sessions = read_records(tmp_path / "run", SessionRecord)
    assert [(one.reason, one.step, one.lr_scale) for one in sessions] == [
        ("start", 0, 1.0),
        ("rollback", 5, 0.5),
        ("rollback", 5, 0.25),
    ]
    ours, theirs = (read_records(folder, StepRecord) for folder in (tmp_path / "run", uninterrupted))
    assert [one.step for one in ours] == list(range(STEPS))
    assert [one.loss for one in ours[:6]] == [one.loss for one in theirs[:6]]
    for one, other in zip(ours[5:], theirs[5:], strict=True):
        assert one.learning_rate == pytest.approx(other.learning_rate / 4)


@pytest.mark.slow
def test_a_run_that_never_gets_better_stops_after_all(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    given = settings(
        sources,
        tmp_path / "run",
        guard={"action": "rollback", "max_rollbacks": 1},
        logging={"steps": 1, "progress": "off"},
    )
    said = ranks(2).run(run, given=given, nan_at=(2, 2))
    assert said[0].endswith("stopped after 1 rollback(s), there is no checkpoint yet")


def test_a_run_in_the_way_is_never_overwritten_by_a_checkpoint_from_elsewhere(
    ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    given = settings(sources, tmp_path / "run")
    ranks(2).run(run, given=given, signal_at=1)
    said = ranks(2).run(run, given=given, resume=str(uninterrupted))
    assert said[0] is not None
    assert "already holds a run" in said[0]


def test_a_checkpoint_may_be_named(ranks: RankPools, sources: Path, tmp_path: Path, uninterrupted: Path) -> None:
    given = settings(sources, tmp_path / "branch")
    path = CheckpointStore(uninterrupted / "checkpoints").path(5)
    assert ranks(2).run(run, given=given, resume=str(path)) == [None, None]
    assert losses(tmp_path / "branch") == losses(uninterrupted)[5:]
    assert json.loads((tmp_path / "branch" / "sessions.jsonl").read_text())["checkpoint"] == str(path)
    name = "final/model.safetensors"
    assert (tmp_path / "branch" / name).read_bytes() == (uninterrupted / name).read_bytes()
