"""One job from start, or from a checkpoint, to its exported model. No deepspeed.runtime."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from progtuning_ds import __version__
from progtuning_ds.checkpoint import Checkpoint
from progtuning_ds.checkpoint.agreement import on_first
from progtuning_ds.errors import ConfigError
from progtuning_ds.methods import misread_inputs
from progtuning_ds.train import run_dir
from progtuning_ds.train.assembly import Built, build
from progtuning_ds.train.export import save_final, save_merged
from progtuning_ds.train.frozen import FrozenWeights, finish
from progtuning_ds.train.guard import GuardError
from progtuning_ds.train.job import Job
from progtuning_ds.train.keeper import Keeper
from progtuning_ds.train.loop import TrainingLoop
from progtuning_ds.train.memory_control import MemoryControl
from progtuning_ds.train.memory_plan import plan_memory
from progtuning_ds.train.model_card import write_card
from progtuning_ds.train.models import load_model
from progtuning_ds.train.monitors import MonitorObserver
from progtuning_ds.train.observers import Observer, Observers, Recorder
from progtuning_ds.train.outcome import GuardStopError
from progtuning_ds.train.plots import draw_training
from progtuning_ds.train.position import Position, rewind_records
from progtuning_ds.train.progress import make_progress
from progtuning_ds.train.ranks import Ranks, memory_bytes
from progtuning_ds.train.records import RecordLog, RunRecord, SessionRecord, StageRecord, read_records
from progtuning_ds.train.report import write_report
from progtuning_ds.train.run_lock import run_lock
from progtuning_ds.train.signals import StopSignals
from progtuning_ds.train.submit import write_submissions
from progtuning_ds.train.summary import print_summary
from progtuning_ds.zero.hyper_state import scale_learning_rate


class Session:
    """Runs a job in its directory.

    Args:
        job: what to do.
        ranks: this process among the others.
        console: where to speak; silent but on the first rank.
        signals: says when the run has to stop.
    """

    def __init__(self, job: Job, ranks: Ranks, console: Console, signals: StopSignals) -> None:
        self.job = job
        self.ranks = ranks
        self.console = console
        self.signals = signals
        self.folder = Path(job.config.output_dir).expanduser()
        self.keeper = Keeper(job, self.folder)
        # The same on every rank, or they would cut their rows differently.
        self.memory = plan_memory(job, ranks.device.type, max(ranks.gather(memory_bytes(ranks.device))))
        for stage in job.plan.stages:
            problem = self.memory.problem(stage.index)
            if problem is not None:
                raise ConfigError(problem)

    def run(self, resume: str) -> None:
        """Train, export and sum up. Collective; see `run_program` for `resume` and for the errors."""
        if resume == run_dir.AUTO and run_dir.is_complete(self.folder):
            self._say(f"the {self.job.kind} run in {self.folder} is complete")
            return
        with run_lock(self.folder):
            self._run(resume)

    def _run(self, resume: str) -> None:
        for line in describe(self.job):
            self._say(line)
        found, passed_over = (None, []) if resume == run_dir.NEVER else self.keeper.find(resume)
        for line in passed_over:
            self._say(f"warning: {line}")
        on_first(lambda: self._make_folder(keep=found is not None))
        observer = self._observer()
        try:
            record = self._train(observer, found, "; ".join(passed_over))
            if self.ranks.is_first:
                self._describe_model(record)
            if self.job.config.method.merge:
                on_first(self._save_merged)  # before the run counts as complete
            observer.run_finished(record)
        finally:
            observer.close()
        if self.ranks.is_first:
            self._sum_up()

    def _describe_model(self, record: RunRecord) -> None:
        stages = read_records(self.folder, StageRecord)
        sessions = read_records(self.folder, SessionRecord)
        write_card(self.folder / run_dir.FINAL, self.job.until(record.total_steps), record, stages, sessions)

    def _save_merged(self) -> None:
        job = self.job
        base = load_model(job.task.auto_class, job.config.model, job.shape, job.settings.precision)
        save_merged(base, self.folder / run_dir.FINAL, job.tokenizer, self.folder / run_dir.MERGED)
        kind = job.config.method.quantization
        into = "" if kind == "none" else f", into weights that are not in {kind}, other than those it was trained on"
        self._say(f"merged model in {self.folder / run_dir.MERGED}{into}")

    def _make_folder(self, *, keep: bool) -> None:
        self.keeper.store.sweep()
        run_dir.make_run_dir(self.folder, keep=keep)
        run_dir.write_inputs(self.folder, self.job.config, self.job.deepspeed, self.job.plan)

    def _train(self, observer: Observer, found: Checkpoint | None, message: str) -> RunRecord:
        reason = "start" if found is None else "resume"
        rollbacks = 0
        while True:
            built, position = self._build(found, rollbacks)
            frozen = self._frozen_weights(built, position, found)
            self._tell(observer, position, found, reason, message)
            memory = MemoryControl(self.job, self.memory, built, self.ranks, self._say, self.folder)
            watcher = self._with_monitors(observer, built)
            loop = TrainingLoop(self.job, built, self.ranks, watcher, self.keeper, self.signals, position, memory)
            try:
                metrics = loop.run()
                scores = finish(self.job, built, self.ranks, frozen, partial(self._export, built))
                if loop.position.ended:
                    self._say(f"ended early: {self.job.task.main_metric} has not risen (train.early_stopping)")
                record = run_record(self.job.until(loop.position.done), self.ranks, metrics, loop.seconds)
                return replace(record, frozen_metrics=scores)
            except GuardError as trip:
                rollbacks = loop.position.rollbacks + 1
                found, message, reason = self._way_back(trip, rollbacks), str(trip), "rollback"
            finally:
                built.close()

    def _export(self, built: Built) -> None:
        """Write the model beside the place where it belongs, then put it there: it is whole or not there."""
        # ZeRO-3 may be fetching weights ahead for a pass that the last evaluation did not run.
        built.engine.empty_partition_cache()
        new = self.folder / f"{run_dir.FINAL}.new"
        save_final(built.module, self.job.tokenizer, new, is_first=self.ranks.is_first)
        on_first(lambda: run_dir.put_in_place(new, self.folder / run_dir.FINAL))
        for path in write_submissions(self.job, built.engine, self.ranks, self.folder / run_dir.SUBMISSION):
            self._say(f"predictions of the test rows in {path}")

    def _frozen_weights(self, built: Built, position: Position, found: Checkpoint | None) -> FrozenWeights:
        """Where blocks that freeze leave their exact weights, before they are quantized."""
        frozen = FrozenWeights(self.folder, position.frozen)
        frozen.take_over(None if found is None else found.folder.parent.parent)
        if built.stages.compression is not None:
            built.stages.compression.keep = frozen.keep
        return frozen

    def _build(self, found: Checkpoint | None, rollbacks: int) -> tuple[Built, Position]:
        built = build(self.job, self.ranks)
        self._say(_who_steps(built.stages.kernel, self.job.config.optimizer.kernel))
        self._warn_of_misread(built)
        position = Position() if found is None else self.keeper.load(built.stages, found)
        position.rollbacks = max(position.rollbacks, rollbacks)
        scale = self.job.config.guard.rollback_factor**position.rollbacks
        if position.lr_scale != scale:
            scale_learning_rate(built.stages.adapter, scale / position.lr_scale)
            position.lr_scale = scale
        return built, position

    def _warn_of_misread(self, built: Built) -> None:
        inputs = misread_inputs(built.module) if self.job.config.method.quantization == "nf4" else []
        if inputs:
            which = ", ".join(map(str, inputs))
            self._say(
                f"warning: on this processor bitsandbytes reads NF4 weights with {which} inputs wrongly; "
                f"train on a GPU or with method.quantization=int8"
            )

    def _tell(
        self, observer: Observer, position: Position, found: Checkpoint | None, reason: str, message: str
    ) -> None:
        on_first(lambda: rewind_records(self.folder, position))
        if reason == "rollback":
            self._say(f"warning: {message}")
        if reason != "start":
            total = self.job.plan.total_steps
            at = f"from {found.folder}" if found is not None else "from the beginning"
            rate = f", learning rate x {position.lr_scale:g}" if position.lr_scale != 1 else ""
            self._say(f"{reason}: going on {at}, after step {position.done} of {total}{rate}")
        name = None if found is None else str(found.folder)
        world, zero = self.ranks.world_size, self.job.zero_stage
        observer.session_started(SessionRecord(position.done, reason, name, world, zero, position.lr_scale, message))

    def _way_back(self, trip: GuardError, rollbacks: int) -> Checkpoint | None:
        """The checkpoint to go back to, or None for the beginning.

        Raises:
            GuardStopError: if the run shall stop instead.
        """
        guard = self.job.config.guard
        if guard.action == "rollback" and rollbacks <= guard.max_rollbacks:
            return self.keeper.find(run_dir.AUTO)[0]
        steps = self.keeper.store.steps()
        good = f"the checkpoint after step {steps[0]} is good" if steps else "there is no checkpoint yet"
        tried = f" after {rollbacks - 1} rollback(s)" if rollbacks > 1 else ""
        raise GuardStopError(f"{trip}; stopped{tried}, {good}")

    def _observer(self) -> Observer:
        if not self.ranks.is_first:
            return Observer()
        log = Recorder(RecordLog(self.folder))
        return Observers([log, make_progress(self.job.config.logging.progress, self.console)])

    def _with_monitors(self, observer: Observer, built: Built) -> Observer:
        """Add the monitors that the DeepSpeed JSON asks for; the engine owns them."""
        monitor = built.engine.monitor
        if not (monitor.enabled and self.ranks.is_first):
            return observer
        return Observers([observer, MonitorObserver(monitor, self.job.settings.global_batch_size)])

    def _sum_up(self) -> None:
        run, stages = read_run(self.folder)
        print_summary(self.console, run, stages)
        if self.job.config.logging.plot:
            draw_training(self.folder, self.folder / run_dir.PLOT)
            self._say(f"report in {write_report(self.folder)}")
        self._say(f"model in {self.folder / run_dir.FINAL}, records in {self.folder}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(job: Job) -> list[str]:
    """What is about to happen, for the user to check; one line each."""
    settings, plan = job.settings, job.plan
    return [
        f"{job.kind}: {job.shape.model_type} with {len(job.blocks)} blocks, {job.params.numel:,} parameters, "
        f"in {settings.precision}, ZeRO stage {job.zero_stage} on {settings.world_size} rank(s)",
        *_trainable_report(job),
        *job.task.notes,
        f"{plan.total_steps} steps in {len(plan.stages)} stage(s); {settings.global_batch_size} rows a step = "
        f"{settings.micro_batch_size} x {settings.gradient_accumulation_steps} accumulated x "
        f"{settings.world_size} rank(s); peak learning rate {settings.learning_rate:g}, "
        f"{job.warmup_steps} steps of warm-up",
    ]


def _trainable_report(job: Job) -> list[str]:
    """What a parameter-efficient method trains, in PEFT's words, by stage and summed over the run."""
    method = job.config.method
    if method.kind == "full":
        return []
    total, run = job.params.numel, job.account
    base = "" if method.quantization == "none" else f" on a base in {method.quantization}"
    lines = [f"method: {method.kind}{base}"]
    for stage in run.stages:
        params = stage.trainable_params
        share = 100 * params / total
        lines.append(
            f"  stage {stage.index + 1}/{len(run.stages)}: trainable params: {params:,} || all params: {total:,} || "
            f"trainable%: {share:.4f}"
        )
    return [*lines, f"  updated over the run: {run.updated_params:,} of {run.updated_params_full:,} without freezing"]


def _who_steps(kernel: str, asked: str) -> str:
    who = {"deepspeed": "DeepSpeed's own", "triton": "fused, by Triton", "reference": "fused, in plain PyTorch"}
    return f"optimizer step: {who.get(kernel, 'fused, by PyTorch for CPUs')} (optimizer.kernel: {asked})"


def run_record(job: Job, ranks: Ranks, metrics: dict[str, dict[str, float]], seconds: float) -> RunRecord:
    """Sum up a run that has ended well; `seconds` over all its sessions."""
    total = job.account
    libraries = ("torch", "deepspeed", "transformers", "datasets")
    return RunRecord(
        kind=job.kind,
        world_size=ranks.world_size,
        device=ranks.device.type,
        zero_stage=job.zero_stage,
        precision=job.settings.precision,
        total_steps=job.plan.total_steps,
        updated_params=total.updated_params,
        updated_params_full=total.updated_params_full,
        saving=total.saving,
        seconds=seconds,
        main_metric=job.task.main_metric,
        metrics=metrics,
        versions={
            "progtuning_ds": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
    )


def read_run(folder: Path) -> tuple[RunRecord, list[StageRecord]]:
    """Read back what a complete run recorded of itself and of its stages."""
    return read_records(folder, RunRecord)[-1], read_records(folder, StageRecord)
