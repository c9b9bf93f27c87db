"""A save whose files are written while training goes on. No deepspeed.runtime.

A thread touches nothing but its own copies and files, and no thread communicates: that the files of all ranks are
there is agreed upon by the training threads, between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progtuning_ds.checkpoint import agreement
from progtuning_ds.checkpoint.manifest import FileSeal
from progtuning_ds.checkpoint.saving import begin_checkpoint, complete_checkpoint
from progtuning_ds.checkpoint.store import CheckpointStore
from progtuning_ds.engine import StageEngine


class BackgroundSave:
    """A checkpoint in the making: it is none until `finish` has returned. Collective.

    Training may go on as soon as this is made. Host memory holds a copy of all that changes until it is written.
    Only one may be under way in a store.

    Args:
        stages: as for `save_checkpoint`, like the rest.
        store: the run's folder of checkpoints.
        step: optimizer steps done.
        program: what the caller wants back.
        about: plain JSON values for the manifest.

    Raises:
        CheckpointError: on all ranks, in one line, if there is no room for it.
    """

    def __init__(
        self,
        stages: StageEngine,
        store: CheckpointStore | str | Path,
        step: int,
        *,
        program: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        began = time.perf_counter()
        self.step = step
        self._draft = begin_checkpoint(stages, store, step, program=program, about=about)
        self._seals: dict[str, FileSeal] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        try:
            self._draft, self._seals = self._draft.detached()
        except OSError as error:  # told by `finish`, on all ranks
            self._error = error
        else:
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()
        self.stalled = time.perf_counter() - began
        """Seconds for which training waited."""

    def is_written(self) -> bool:
        """Whether all ranks have written their files, or failed to. Collective."""
        return not any(agreement.gather(self._thread is not None and self._thread.is_alive()))

    def finish(self) -> Path:
        """Wait for all ranks' files and make the checkpoint visible. Collective.

        Raises:
            CheckpointError: on all ranks, as `save_checkpoint` does, if a rank could not write.
        """
        began = time.perf_counter()
        try:
            return complete_checkpoint(self._draft, self._result)
        finally:
            self.stalled += time.perf_counter() - began

    def _write(self) -> None:
        try:
            self._seals |= self._draft.write()
        except BaseException as error:  # noqa: BLE001 - raised again by `finish`
            self._error = error

    def _result(self) -> dict[str, FileSeal]:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._seals
