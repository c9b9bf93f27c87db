"""The training loop: steps, stages and evaluations in their order. Knows no task, no files; no deepspeed.runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from progtuning_ds.engine import StageTransition
from progtuning_ds.schedule import Stage
from progtuning_ds.tasks import Batch
from progtuning_ds.train.assembly import Built
from progtuning_ds.train.batches import step_batches
from progtuning_ds.train.evaluate import evaluate
from progtuning_ds.train.job import Job
from progtuning_ds.train.observers import Observer
from progtuning_ds.train.ranks import Ranks, memory_bytes
from progtuning_ds.train.records import EvaluationRecord, StageRecord, StepRecord

STATE_CATEGORIES = ("master_weights", "exp_avg", "exp_avg_sq", "other_state")


@dataclass
class _Step:
    """A finished step whose loss is still on this rank's device."""

    step: int
    loss: torch.Tensor
    learning_rate: float
    grad_norm: float | None
    seconds: float
    memory: int


@dataclass
class _StageTotals:
    """What has gone into the current stage so far."""

    stage: Stage
    transition: StageTransition | None
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


class TrainingLoop:
    """Runs a job on its engine and tells an observer.

    Args:
        job: what to do.
        built: the engine to do it on.
        ranks: this process among the others.
        observer: told what happens on this rank.
    """

    def __init__(self, job: Job, built: Built, ranks: Ranks, observer: Observer) -> None:
        self.job = job
        self.built = built
        self.ranks = ranks
        self.observer = observer
        self._pending: list[_Step] = []
        self._totals = _StageTotals(job.plan.stages[0], None)

    def run(self) -> dict[str, dict[str, float]]:
        """Train to the end and return the last metrics of every split. Collective."""
        self.observer.run_started(self.job)
        metrics: dict[str, dict[str, float]] = {}
        self.built.engine.train()
        for step, batches in enumerate(step_batches(self.job, self.ranks)):
            stage = self.job.plan.stage_at(step)
            transition = self.built.stages.advance(step)
            if step == stage.steps.start:
                self._totals = _StageTotals(stage, transition)
                self.observer.stage_started(stage, transition)
            self._train_step(step, batches)
            metrics |= self._after_step(step, stage)
        return metrics

    def _train_step(self, step: int, batches: list[Batch]) -> None:
        engine, began = self.built.engine, time.perf_counter()
        rate = float(engine.get_lr()[0])
        losses = []
        for batch in batches:
            inputs = {name: values.to(self.ranks.device, non_blocking=True) for name, values in batch.items()}
            loss = self.job.task.loss(engine, inputs)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        seconds = time.perf_counter() - began
        self._totals.seconds += seconds
        norm = engine.get_global_grad_norm()
        self._pending.append(
            _Step(
                step=step,
                loss=torch.stack(losses).mean(),  # every forward pass has the same number of rows
                learning_rate=rate,
                grad_norm=None if norm is None else float(norm),
                seconds=seconds,
                memory=memory_bytes(self.ranks.device),
            )
        )

    def _after_step(self, step: int, stage: Stage) -> dict[str, dict[str, float]]:
        job, done = self.job, step + 1
        due = {
            "epoch": done % job.order.steps_per_epoch == 0,
            "stage": done == stage.steps.stop,
            "end": done == job.plan.total_steps,
        }
        reasons = tuple(name for name, is_due in due.items() if is_due)
        if reasons or done % job.config.logging.steps == 0:
            self._report_steps()
        metrics: dict[str, dict[str, float]] = {}
        if reasons:
            splits = [name for name in job.task.evaluations if name != "test" or due["end"]]
            metrics = {name: self._evaluate(step, name, reasons) for name in splits}
            self._totals.metrics = metrics["validation"]
        if due["stage"]:
            self._report_stage()
        return metrics

    def _report_steps(self) -> None:
        losses = self.ranks.mean(torch.stack([entry.loss for entry in self._pending]))
        rows = self.job.settings.global_batch_size
        records = [
            StepRecord(
                step=entry.step,
                epoch=(entry.step + 1) / self.job.order.steps_per_epoch,
                stage=self._totals.stage.index,
                loss=loss,
                learning_rate=entry.learning_rate,
                grad_norm=entry.grad_norm,
                seconds=entry.seconds,
                samples_per_second=rows / entry.seconds,
                memory_bytes=entry.memory,
            )
            for entry, loss in zip(self._pending, losses, strict=True)
        ]
        self._pending.clear()
        self.observer.steps_done(records)

    def _evaluate(self, step: int, split: str, reasons: tuple[str, ...]) -> dict[str, float]:
        began = time.perf_counter()
        rows = self.job.task.evaluations[split]
        size = self.job.settings.eval_batch_size
        metrics, _ = evaluate(self.job.task, self.built.engine, rows, self.ranks, size)
        record = EvaluationRecord(
            step=step,
            epoch=(step + 1) / self.job.order.steps_per_epoch,
            stage=self._totals.stage.index,
            split=split,
            reasons=reasons,
            rows=len(rows.rows),
            metrics=metrics,
            seconds=time.perf_counter() - began,
        )
        self.observer.evaluated(record)
        return metrics

    def _report_stage(self) -> None:
        totals, stage = self._totals, self._totals.stage
        memory = self.built.stages.memory()
        state = sum(memory.get(category, 0) for category in STATE_CATEGORIES)
        transition = totals.transition
        record = StageRecord(
            stage=stage.index,
            first_step=stage.steps.start,
            steps=len(stage.steps),
            trainable_blocks=stage.trainable_blocks,
            embeddings=stage.embeddings,
            trainable_params=self.job.account.stages[stage.index].trainable_params,
            memory=memory,
            state_bytes_per_rank=tuple(self.ranks.gather(state)),
            released_bytes=transition.released_bytes if transition else {},
            moved_bytes=transition.moved_bytes if transition else 0,
            transition_seconds=transition.seconds if transition else 0.0,
            seconds=totals.seconds,
            samples_per_second=len(stage.steps) * self.job.settings.global_batch_size / totals.seconds,
            metrics=totals.metrics,
        )
        self.observer.stage_finished(record)
