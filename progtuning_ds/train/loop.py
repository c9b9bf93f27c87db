"""The training loop: steps, stages and evaluations in their order. Knows no task, no files; no deepspeed.runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from progtuning_ds.engine import StageTransition
from progtuning_ds.schedule import Stage
from progtuning_ds.tasks import Batch
from progtuning_ds.train.assembly import Built
from progtuning_ds.train.batches import step_batches
from progtuning_ds.train.evaluate import evaluate
from progtuning_ds.train.guard import Guard, GuardError, WatchedStep
from progtuning_ds.train.job import Job
from progtuning_ds.train.keeper import Keeper
from progtuning_ds.train.losses import StepLoss
from progtuning_ds.train.memory_control import MemoryControl
from progtuning_ds.train.observers import Observer
from progtuning_ds.train.outcome import PreemptedError, RunEndError
from progtuning_ds.train.position import Position, StageTotals
from progtuning_ds.train.ranks import Ranks, memory_bytes
from progtuning_ds.train.records import CheckpointRecord, EvaluationRecord, StageRecord, StepRecord
from progtuning_ds.train.signals import StopSignals

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
    skipped: bool


class TrainingLoop:
    """Runs a job on its engine and tells an observer.

    Args:
        job: what to do.
        built: the engine to do it on.
        ranks: this process among the others.
        observer: told what happens on this rank.
        keeper: saves the run.
        signals: says when it has to stop.
        position: where to begin; the engine must be there too. Kept up to date.
        memory: keeps to the budget and chooses rows per pass.
    """

    def __init__(
        self,
        job: Job,
        built: Built,
        ranks: Ranks,
        observer: Observer,
        keeper: Keeper,
        signals: StopSignals,
        position: Position,
        memory: MemoryControl,
    ) -> None:
        self.job = job
        self.built = built
        self.ranks = ranks
        self.observer = observer
        self.keeper = keeper
        self.signals = signals
        self.position = position
        self.memory = memory
        self._loss = StepLoss(job.task, ranks)
        self._guard = Guard(job.config.guard, job.settings.precision)
        if position.guard:
            self._guard.set_state(position.guard)
        self._pending: list[_Step] = []
        self._began = time.perf_counter() - position.seconds

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run up to now, earlier sessions included."""
        return time.perf_counter() - self._began

    def run(self) -> dict[str, dict[str, float]]:
        """Train to the end and return the last metrics of every split. Collective.

        Raises:
            PreemptedError: on all ranks, after a signal to any of them; the run is saved.
            GuardError: on all ranks, if training has gone wrong.
            CheckpointError: on all ranks, if the run cannot be saved.
            MemoryBudgetError: on all ranks, before a stage that would need more than the budget.
        """
        self.observer.run_started(self.job)
        try:
            self._run()
        except (GuardError, RunEndError):  # on all ranks
            self._tell_saved(self.keeper.collect(wait=True))
            raise
        self._tell_saved(self.keeper.collect(wait=True))
        return self.position.metrics

    def _run(self) -> None:
        position = self.position
        self.built.engine.train()
        if not position.settled:
            self._settle()
        # A run that ended early, and died before it was told, has no step left.
        steps = range(position.done, position.done if position.ended else self.job.plan.total_steps)
        feed = step_batches(self.job, self.ranks, position.done, self.memory.micro_batches)
        for step in steps:
            stage = self.job.plan.stage_at(step)
            if step == stage.steps.start:
                self.memory.before(stage)
            transition = self.built.stages.advance(step)
            if step == stage.steps.start:
                position.stage = _totals(transition)
                self.observer.stage_started(stage, transition)
            if step in (stage.steps.start, steps.start) and self.memory.entered(stage):
                feed = step_batches(self.job, self.ranks, step, self.memory.micro_batches)
            self._train_step(step, stage, next(feed))
            position.done, position.settled = step + 1, False
            signal = self.signals.wanted()
            if signal is not None:
                self._save()
                raise PreemptedError(
                    f"stopped by {signal} after step {position.done} of {self.job.plan.total_steps}; the run is saved, "
                    f"go on with the same command and --resume auto"
                )
            self._settle()
            if self.keeper.due(position):
                self._save()
            else:
                self._tell_saved(self.keeper.collect(wait=False))
            if position.ended:
                break

    def _save(self) -> None:
        if self._pending:
            self._report_steps()  # a state that the guard has not seen is not saved
        self.position.guard = self._guard.state()
        self.position.seconds = self.seconds
        self._tell_saved(self.keeper.save(self.built.stages, self.position))

    def _tell_saved(self, records: list[CheckpointRecord]) -> None:
        for record in records:
            self.observer.saved(record)

    def _forward(self, batch: Batch) -> torch.Tensor:
        engine = self.built.engine
        return self._loss(engine, batch, engine.gradient_accumulation_steps())

    def _train_step(self, step: int, stage: Stage, batches: list[Batch]) -> None:
        engine, began = self.built.engine, time.perf_counter()
        skipped = engine.skipped_steps
        rate = float(engine.get_lr()[0])
        losses = []
        with self.memory.watching(stage):
            self._loss.begin(batches)
            for batch in batches:
                loss = self._forward(batch)
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
                del loss  # with the graph, in which bitsandbytes' int8 layers keep their inputs even after backward
        seconds = time.perf_counter() - began
        self.position.stage.seconds += seconds
        norm = engine.get_global_grad_norm()
        self._pending.append(
            _Step(
                step=step,
                loss=torch.stack(losses).mean(),  # the passes are weighed by what they hold
                learning_rate=rate,
                grad_norm=None if norm is None else float(norm),
                seconds=seconds,
                memory=memory_bytes(self.ranks.device),
                skipped=engine.skipped_steps > skipped,
            )
        )

    def _settle(self) -> None:
        """Do what is due after the last step: progress, evaluation, the record of the stage."""
        job, done = self.job, self.position.done
        stage = job.plan.stage_at(done - 1)
        due = {
            "epoch": done % job.order.steps_per_epoch == 0,
            "stage": done == stage.steps.stop,
            "end": done == job.plan.total_steps,
        }
        reasons = tuple(name for name, is_due in due.items() if is_due)
        stage_is_over = due["stage"]
        if self._pending and (reasons or done % job.config.logging.steps == 0):
            self._report_steps()
        if reasons:
            splits = [name for name in job.task.evaluations if name != "test" or due["end"]]
            metrics = {name: self._evaluate(stage, name, reasons) for name in splits}
            self.position.metrics |= metrics
            self.position.evaluated = done
            self.position.stage.metrics = metrics["validation"]
            if due["epoch"] and not due["end"] and self._waited_enough(metrics["validation"]):
                self.position.ended = stage_is_over = True
                left = [name for name in job.task.evaluations if name not in metrics]
                self.position.metrics |= {name: self._evaluate(stage, name, ("end",)) for name in left}
        if stage_is_over:
            self._report_stage(stage)
        self.position.settled = True

    def _waited_enough(self, metrics: dict[str, float]) -> bool:
        """Whether the main metric has not risen for as many epochs as the run may wait."""
        position, patience = self.position, self.job.config.train.early_stopping
        score = metrics[self.job.task.main_metric]
        if position.best is None or score > position.best:
            position.best, position.waited = score, 0
            return False
        position.waited += 1
        return patience is not None and position.waited >= patience

    def _report_steps(self) -> None:
        losses = self.ranks.mean(torch.stack([entry.loss for entry in self._pending]))
        rows = self.job.settings.global_batch_size
        records = [
            StepRecord(
                step=entry.step,
                epoch=(entry.step + 1) / self.job.order.steps_per_epoch,
                stage=self.job.plan.stage_at(entry.step).index,
                loss=loss,
                learning_rate=entry.learning_rate,
                grad_norm=entry.grad_norm,
                seconds=entry.seconds,
                samples_per_second=rows / entry.seconds,
                memory_bytes=entry.memory,
            )
            for entry, loss in zip(self._pending, losses, strict=True)
        ]
        watched = [WatchedStep(record, entry.skipped) for record, entry in zip(records, self._pending, strict=True)]
        self._pending.clear()
        self.observer.steps_done(records)
        self._guard.check(watched)

    def _evaluate(self, stage: Stage, split: str, reasons: tuple[str, ...]) -> dict[str, float]:
        began, done = time.perf_counter(), self.position.done
        rows = self.job.task.evaluations[split]
        size = self.job.settings.eval_batch_size
        metrics, _ = evaluate(self.job.task, self.built.engine, rows, self.ranks, size)
        record = EvaluationRecord(
            step=done - 1,
            epoch=done / self.job.order.steps_per_epoch,
            stage=stage.index,
            split=split,
            reasons=reasons,
            rows=len(rows.rows),
            metrics=metrics,
            seconds=time.perf_counter() - began,
        )
        self.observer.evaluated(record)
        return metrics

    def _report_stage(self, stage: Stage) -> None:
        totals = self.position.stage
        steps = self.position.done - stage.steps.start  # fewer than planned where the run ends early
        memory = self.built.stages.memory()
        state = sum(memory.get(category, 0) for category in STATE_CATEGORIES)
        record = StageRecord(
            stage=stage.index,
            first_step=stage.steps.start,
            steps=steps,
            trainable_blocks=stage.trainable_blocks,
            embeddings=stage.embeddings,
            trainable_params=self.job.account.stages[stage.index].trainable_params,
            memory=memory,
            state_bytes_per_rank=tuple(self.ranks.gather(state)),
            released_bytes=totals.released_bytes,
            moved_bytes=totals.moved_bytes,
            transition_seconds=totals.transition_seconds,
            seconds=totals.seconds,
            samples_per_second=steps * self.job.settings.global_batch_size / totals.seconds,
            metrics=totals.metrics,
        )
        self.observer.stage_finished(record)
        self.observer.memory_measured(self.memory.record(stage))


def _totals(transition: StageTransition | None) -> StageTotals:
    if transition is None:
        return StageTotals()
    return StageTotals(dict(transition.released_bytes), transition.moved_bytes, transition.seconds)
