"""Feeds one rank the batches of each optimizer step, in the job's order. No deepspeed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from progtuning_ds.tasks import Batch
from progtuning_ds.train.job import Job
from progtuning_ds.train.order import micro_batches
from progtuning_ds.train.ranks import Ranks
from progtuning_ds.train.signals import ignore_in_worker


def step_batches(
    job: Job, ranks: Ranks, first_step: int = 0, sizes: Sequence[int] | None = None
) -> Iterator[list[Batch]]:
    """Yield the forward passes of each optimizer step of a run, from `first_step` to the end, on the CPU.

    Args:
        job: the run.
        ranks: this process among the others.
        first_step: where to begin.
        sizes: rows per pass in each stage; by default the job's throughout.
    """
    per_epoch = job.order.steps_per_epoch
    sizes = sizes or [job.settings.micro_batch_size] * len(job.plan.stages)
    for epoch in range(first_step // per_epoch, job.config.train.epochs):
        begin = max(first_step, epoch * per_epoch)
        steps = job.order.epoch(epoch)[begin - epoch * per_epoch :]
        mine = [
            micro_batches(rows, ranks.rank, ranks.world_size, sizes[job.plan.stage_at(step).index])
            for step, rows in enumerate(steps, start=begin)
        ]
        loader = DataLoader(
            job.task.train.rows,
            batch_sampler=[rows for step in mine for rows in step],
            collate_fn=job.task.collate,
            num_workers=job.config.data.num_workers,
            worker_init_fn=ignore_in_worker,
            pin_memory=ranks.device.type != "cpu",
            # Its own generator: the loader draws from it, and dropout must not depend on who loads the data.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        for step in mine:
            yield [next(batches) for _ in step]
