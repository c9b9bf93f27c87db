"""The folder protocol: whatever is interrupted where, there is a complete checkpoint if there ever was one."""

from __future__ import annotations

from pathlib import Path

import pytest

from progtuning_ds.checkpoint import CheckpointStore
from progtuning_ds.checkpoint import store as store_module


def make(store: CheckpointStore, step: int, text: str = "") -> Path:
    temporary = store.begin(step)
    (temporary / "data").write_text(text or f"data of {step}")
    return store.publish(temporary, step)


def test_a_checkpoint_appears_only_when_it_is_published(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    make(store, 5)
    temporary = store.begin(10)
    (temporary / "data").write_text("half")
    assert store.steps() == [5]
    assert store.candidates() == [tmp_path / "step-00000005"]
    store.publish(temporary, 10)
    assert store.steps() == [10, 5]
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert store.candidates()[0] == tmp_path / "step-00000010"


def test_what_a_dead_save_left_goes_with_the_next(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (store.begin(5) / "data").write_text("half")
    (tmp_path / ".new-latest").write_text("half")
    make(store, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000006"]


def test_the_latest_is_tried_first_even_if_a_later_step_is_there(tmp_path: Path) -> None:
    """A run that went back to an earlier step goes on from where it is now."""
    store = CheckpointStore(tmp_path)
    for step in (5, 10, 7):
        make(store, step)
    assert [path.name for path in store.candidates()] == ["step-00000007", "step-00000010", "step-00000005"]


@pytest.mark.parametrize("content", [None, b"", b"step-00000099\n", b"../../etc\n", b"\xff\xfe"])
def test_a_bad_latest_is_no_obstacle(tmp_path: Path, content: bytes | None) -> None:
    store = CheckpointStore(tmp_path)
    for step in (5, 10):
        make(store, step)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert [path.name for path in store.candidates()] == ["step-00000010", "step-00000005"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    make(store, 5, "damaged")
    make(store, 5, "good")
    assert (store.path(5) / "data").read_text() == "good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_only_the_named_steps_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        make(store, step)
    (tmp_path / "notes.txt").write_text("mine")
    store.remove_all_but({2, 4})
    assert store.steps() == [4, 2]
    assert (tmp_path / "notes.txt").exists()


def test_there_is_a_complete_checkpoint_whichever_call_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename, removal and sync of a save in turn is the one that never happens."""
    for number in range(40):
        store = CheckpointStore(tmp_path / str(number))
        make(store, 5)
        make(store, 10)
        fuse = Fuse(number)
        with monkeypatch.context() as patch:
            for owner, name in FATAL:
                patch.setattr(owner, name, fuse.guard(getattr(owner, name)))
            try:
                make(store, 15)
                store.remove_all_but({10, 15})
            except KeyboardInterrupt:
                finished = False
            else:
                finished = True
        best = CheckpointStore(store.folder).candidates()[0]
        assert best.name in ("step-00000010", "step-00000015")
        assert (best / "data").read_text() == f"data of {int(best.name[-2:])}"
        if finished:
            assert number > 5, "the test stops nothing"
            return
    raise AssertionError("the save never finished")


FATAL = [(Path, name) for name in ("rename", "replace", "mkdir", "unlink")]
FATAL += [(store_module.os, "fsync"), (store_module.shutil, "rmtree")]


class Fuse:
    """Lets so many calls through and stops at the next."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def guard(self, function):
        def guarded(*args, **kwargs):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return function(*args, **kwargs)

        return guarded
