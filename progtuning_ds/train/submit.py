"""Predicts what has no labels and writes it for a test server, at the end of a run. No deepspeed."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from progtuning_ds.tasks import Submits
from progtuning_ds.train.evaluate import predict
from progtuning_ds.train.job import Job
from progtuning_ds.train.ranks import Ranks


def write_submissions(job: Job, model: nn.Module, ranks: Ranks, folder: Path) -> list[Path]:
    """Predict the test splits of a task that has any and write a file for each. Collective; the first rank writes."""
    task = job.task
    if not isinstance(task, Submits):
        return []
    written = []
    for name, rows in task.submissions.items():
        predictions = predict(task, model, rows, ranks, job.settings.eval_batch_size)
        if ranks.is_first:
            written.append(task.write_submission(name, predictions, folder))
    return written
