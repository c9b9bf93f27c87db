"""Shows a run while it goes on: a bar on a terminal, lines elsewhere. No torch of its own, no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from progtuning_ds.accounting import ComponentCounts
from progtuning_ds.engine import StageTransition
from progtuning_ds.schedule import Stage
from progtuning_ds.train.job import Job
from progtuning_ds.train.observers import Observer
from progtuning_ds.train.records import EvaluationRecord, StepRecord


def make_progress(kind: str, console: Console) -> Observer:
    """Return the observer that `logging.progress` asks for; `auto` is a bar if the console is a terminal."""
    if kind == "auto":
        kind = "bar" if console.is_terminal else "lines"
    return {"bar": ProgressBar, "lines": ProgressLines, "off": lambda _: Observer()}[kind](console)


class ProgressLines(Observer):
    """Prints one line per group of steps, stage and evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._total = self._stages = 0
        self._counts: ComponentCounts | None = None

    def run_started(self, job: Job) -> None:
        """Remember what the lines count up to."""
        self._total, self._stages, self._counts = job.plan.total_steps, len(job.plan.stages), job.counts

    def stage_started(self, stage: Stage, transition: StageTransition | None) -> None:
        """Say what trains, and what the transition gave back."""
        assert self._counts is not None, "the run has started"
        self._print(stage_line(stage, self._stages, self._counts))
        if transition is not None:
            self._print(transition_line(transition))

    def steps_done(self, records: Sequence[StepRecord]) -> None:
        """Say where the run is."""
        last = records[-1]
        self._print(f"step {last.step + 1:>{len(str(self._total))}}/{self._total}  {step_words(records, self._stages)}")

    def evaluated(self, record: EvaluationRecord) -> None:
        """Say the metrics."""
        self._print(evaluation_line(record))

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class ProgressBar(ProgressLines):
    """Keeps one bar at the bottom of the terminal; stages and evaluations are printed above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task: TaskID | None = None

    def run_started(self, job: Job) -> None:
        """Show the bar."""
        super().run_started(job)
        self._task = self._progress.add_task("starting", total=self._total)
        self._progress.start()

    def steps_done(self, records: Sequence[StepRecord]) -> None:
        """Move the bar."""
        assert self._task is not None
        words = step_words(records, self._stages)
        self._progress.update(self._task, completed=records[-1].step + 1, description=words)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def step_words(records: Sequence[StepRecord], num_stages: int) -> str:
    """Stage, mean loss, learning rate, throughput and memory of a group of steps."""
    last, count = records[-1], len(records)
    loss = sum(record.loss for record in records) / count
    rate = count / sum(1 / record.samples_per_second for record in records)
    return (
        f"stage {last.stage + 1}/{num_stages}  loss {loss:.4f}  lr {last.learning_rate:.2e}  "
        f"{rate:.1f} samples/s  mem {human_bytes(last.memory_bytes)}"
    )


def stage_line(stage: Stage, num_stages: int, counts: ComponentCounts) -> str:
    """What trains in a stage, in words."""
    parts = what_trains(stage.embeddings, stage.trainable_blocks, counts)
    what = f"{', '.join(parts[:-1])} and the head" if parts[-1] == "head" else ", ".join(parts)
    return f"stage {stage.index + 1}/{num_stages}: training {what} for {len(stage.steps)} steps"


def what_trains(embeddings: bool, blocks: Sequence[int], counts: ComponentCounts) -> list[str]:
    """Name what of a stage has parameters that train: a method may have none in the embeddings or the head.

    Args:
        embeddings: whether the plan trains them.
        blocks: those the plan trains.
        counts: what trains in each component.
    """
    own = [block for block in blocks if counts.blocks[block]]
    return [
        *(["embeddings"] if embeddings and counts.embeddings else []),
        f"block{'s' if len(own) > 1 else ''} {ranges(own)}" if own else "no block",
        *(["head"] if counts.head else []),
    ]


def ranges(blocks: Sequence[int]) -> str:
    """Write sorted indices shortly: (0, 1, 2, 5) is `0-2, 5`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def evaluation_line(record: EvaluationRecord) -> str:
    """The metrics of an evaluation, in words."""
    scores = "  ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
    return f"{record.split} after epoch {record.epoch:.4g}: {scores}  ({record.rows} rows, {record.seconds:.1f} s)"


def human_bytes(count: int) -> str:
    """Write a number of bytes with a binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def transition_line(transition: StageTransition) -> str:
    """What a transition did, in words."""
    released = human_bytes(sum(transition.released_bytes.values()))
    return (
        f"  {len(transition.frozen)} parameters froze, {len(transition.unfrozen)} joined: {released} released "
        f"on each rank, {human_bytes(transition.moved_bytes)} moved between ranks, "
        f"{transition.seconds * 1000:.0f} ms"
    )
