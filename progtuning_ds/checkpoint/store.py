"""The folder of a run's checkpoints: how one becomes visible, which is the latest, which go. Standard library only.

    checkpoints/
        step-00000120/          complete: it was renamed into place after everything in it was synced
        .new-step-00000130/     being written, or left by a run that died: never read, removed by the next save
        latest                  the name of the newest complete one

At every moment there is a complete checkpoint if there ever was one, whatever dies when.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_NEW, _OLD = ".new-", ".old-"


class CheckpointStore:
    """Checkpoints of one run, by optimizer step. Written to by one process at a time.

    Args:
        folder: made when the first checkpoint begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps is, or would be."""
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """Return a new empty folder to write into, after removing what a save that died has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        temporary = self.folder / f"{_NEW}{self.path(step).name}"
        temporary.mkdir()
        return temporary

    def publish(self, temporary: Path, step: int) -> Path:
        """Make a folder that is complete and synced a checkpoint, and the latest one."""
        final = self.path(step)
        sync_folder(temporary)
        aside = self.folder / f"{_OLD}{final.name}"
        if final.exists():
            final.rename(aside)  # a damaged one of the same step, or the run would have gone on from it
        temporary.rename(final)
        sync_folder(self.folder)
        self._point_to(final)
        if aside.exists():
            shutil.rmtree(aside)
        return final

    def abandon(self, temporary: Path) -> None:
        """Remove what was written of a checkpoint that cannot be finished."""
        shutil.rmtree(temporary, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a save or a removal that died has left."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith((_NEW, _OLD)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, newest first, whether sound or damaged."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted((int(match[1]) for match in names if match), reverse=True)

    def candidates(self) -> list[Path]:
        """Checkpoints in the order in which to try them: the one `latest` names, then from newest to oldest."""
        paths = [self.path(step) for step in self.steps()]
        named = self._named()
        return sorted(paths, key=lambda path: path != named) if named in paths else paths

    def remove_all_but(self, steps: Collection[int]) -> None:
        """Remove the checkpoints of all other steps, oldest first."""
        for step in reversed(self.steps()):
            if step not in steps:
                gone = self.folder / f"{_OLD}{self.path(step).name}"
                self.path(step).rename(gone)  # at once: half a checkpoint must not look like one
                remove_tree(gone)

    def _named(self) -> Path | None:
        try:
            name = (self.folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.folder / name if _NAME.fullmatch(name) else None

    def _point_to(self, final: Path) -> None:
        new = self.folder / f"{_NEW}{LATEST}"
        with new.open("w", encoding="utf-8") as file:
            file.write(final.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / LATEST)
        sync_folder(self.folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder that no longer has the name of a checkpoint."""
    shutil.rmtree(folder)


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk, as `fsync` does for what is in a file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
