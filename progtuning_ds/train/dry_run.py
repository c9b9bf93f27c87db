"""Shows a run without doing it: what it is about to do, its stages, and one batch. No deepspeed."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from progtuning_ds.train.batches import step_batches
from progtuning_ds.train.job import Job
from progtuning_ds.train.progress import ranges
from progtuning_ds.train.ranks import Ranks


def show_job(job: Job, ranks: Ranks, console: Console) -> None:
    """Print the plan of a checked job and the shapes of its first batch; no weights are loaded.

    Every rank fetches its batch, so that a row that cannot be collated is found; the first one speaks.
    """
    table = Table(title=f"{job.kind}: {job.plan.total_steps} steps", box=box.SIMPLE_HEAD)
    for name in ("stage", "steps", "blocks", "embeddings", "trainable params"):
        table.add_column(name, justify="left" if name in ("stage", "blocks", "embeddings") else "right")
    for stage, count in zip(job.plan.stages, job.account.stages, strict=True):
        table.add_row(
            f"{stage.index + 1}/{len(job.plan.stages)}",
            f"{len(stage.steps)}",
            ranges(stage.trainable_blocks) or "none",
            "train" if stage.embeddings and job.counts.embeddings else "rest",
            f"{count.trainable_params:,}",
        )
    console.print(table)
    batches = next(iter(step_batches(job, ranks)))
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batches[0].items())
    lines = [
        f"first step, first rank: {len(batches)} forward pass(es), the first one of {shapes}",
        "dry run: nothing was trained and nothing written",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
