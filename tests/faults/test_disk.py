"""A disk that takes no more: one clear line, the checkpoints that are there stay whole, and the run can go on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from progtuning_ds.checkpoint import CheckpointStore, open_checkpoint
from progtuning_ds.train.outcome import CHECKPOINT
from progtuning_ds.train.run_lock import LOCK
from tests.faults.conftest import Bench
from tests.faults.launch import Ended, launch
from tests.train.test_resume import same_results


def full_at_the_second_save() -> None:
    """From then on no file of rank 1 may grow beyond a page, as on a disk that is full."""
    import os

    from progtuning_ds.checkpoint import saving

    rank_state, saves = saving.rank_state, []

    def counted(*args, **kwargs):
        saves.append(None)
        if len(saves) == 2 and os.environ["RANK"] == "1":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return rank_state(*args, **kwargs)

    saving.rank_state = counted


def errors(ended: Ended) -> list[str]:
    assert "Traceback" not in ended.said, ended.said
    return [line for line in ended.said.splitlines() if line.startswith("error: ")]


def test_a_disk_full_on_one_rank_ends_the_run_with_the_last_checkpoint_intact(bench: Bench, tmp_path: Path) -> None:
    arguments = bench.arguments(tmp_path / "run", "zero2", "--resume", "auto")
    ended = launch(arguments, tmp_path, prepare=full_at_the_second_save)
    assert ended.codes == (CHECKPOINT, CHECKPOINT), ended.said
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    (first,) = store.steps()
    says = "error: the checkpoint of step 3 cannot be written: rank 1: File too large; the last complete one is "
    assert f"{says}{store.path(first)}" in errors(ended)
    assert open_checkpoint(store.path(first)).step == first
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == []
    assert launch(arguments, tmp_path).codes == (0, 0)
    same_results(tmp_path / "run", bench.whole("zero2").folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the run's records, but not for what it saves."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_checkpoint_that_has_no_room_is_not_begun(bench: Bench, small_disk: Path, tmp_path: Path) -> None:
    ended = launch(bench.arguments(small_disk / "run", "zero2"), tmp_path / "logs")
    assert ended.codes == (CHECKPOINT, CHECKPOINT), ended.said
    assert "error: the checkpoint of step 2 cannot be written: it takes " in ended.said
    assert ended.said.rstrip().endswith(" left; there is no earlier one")
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_a_read_only_disk_is_told_in_one_line(bench: Bench, small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = launch(bench.arguments(small_disk / "run", "zero2"), tmp_path / "logs")
    assert ended.codes == (CHECKPOINT, CHECKPOINT), ended.said
    assert errors(ended)[0] == f"error: Read-only file system ({small_disk / 'run'})"


def become_nobody() -> None:
    """Root may write anywhere; from where the run touches its directory, ranks are somebody else."""
    from progtuning_ds.train import session

    run = session.Session.run

    def as_nobody(self, resume):
        os.seteuid(65534)
        try:
            run(self, resume)
        finally:
            os.seteuid(0)  # to clean up after itself

    session.Session.run = as_nobody


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True], ids=["cannot-be-made", "is-another-user's"])
def test_a_directory_without_permission_is_told_in_one_line(bench: Bench, tmp_path: Path, there: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody who may not")
    folder = Path(tempfile.mkdtemp())  # pytest's own may not even be looked into by others
    folder.chmod(0o755)
    try:
        if there:
            (folder / "run").mkdir(mode=0o755)
        ended = launch(bench.arguments(folder / "run", "zero2"), tmp_path / "logs", prepare=become_nobody)
    finally:
        shutil.rmtree(folder)
    assert ended.codes == (CHECKPOINT, CHECKPOINT), ended.said
    name = folder / "run" / LOCK if there else folder / "run"
    assert errors(ended)[0] == f"error: Permission denied ({name})"
