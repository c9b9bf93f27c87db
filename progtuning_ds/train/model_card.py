"""The model card of an export: what it was made of, how, and how well it does. No deepspeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from progtuning_ds.train.job import Job
from progtuning_ds.train.models import method_of
from progtuning_ds.train.progress import what_trains
from progtuning_ds.train.records import RunRecord, SessionRecord, StageRecord

CARD = "README.md"


def write_card(
    folder: Path, job: Job, run: RunRecord, stages: Sequence[StageRecord], sessions: Sequence[SessionRecord]
) -> None:
    """Write `README.md` beside an exported model, with the front matter that model hubs read.

    Args:
        folder: where the model is.
        job: what was run.
        run: its summary.
        stages: its stages.
        sessions: the processes that ran it, one after the other.
    """
    text = "\n".join(_lines(job, run, stages, sessions)) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def _lines(job: Job, run: RunRecord, stages: Sequence[StageRecord], sessions: Sequence[SessionRecord]) -> Iterator[str]:
    config, settings = job.config, job.settings
    yield from ("---", yaml.safe_dump(_front_matter(job), sort_keys=False).rstrip(), "---", "")
    yield f"# {config.model.path}, fine-tuned by {run.kind}"
    yield ""
    yield "Progtuning (arXiv 2506.21119) trains in stages: low blocks freeze early, high blocks train longest."
    yield ""
    added = " with what the method adds" if method_of(config.method).adds_parameters else ""
    yield f"- Base model: `{config.model.path}` ({job.shape.model_type}, {job.params.numel:,} parameters{added})"
    yield from _method(job)
    yield f"- Data: {_data(job)}"
    for note in job.task.notes:
        yield f"  - {note}"
    yield (
        f"- Training: {run.total_steps} steps of {settings.global_batch_size} rows, {config.train.epochs} epochs, peak "
        f"learning rate {settings.learning_rate:g}, {job.warmup_steps} steps of warm-up, weight decay "
        f"{settings.weight_decay:g}, {run.precision}, seed {config.train.seed}"
    )
    yield f"- On {run.world_size} rank(s) ({run.device}), ZeRO stage {run.zero_stage}, {len(sessions) or 1} session(s)"
    yield (
        f"- Updated parameters: {run.updated_params:,} instead of {run.updated_params_full:,} without freezing "
        f"({run.saving:.1%} saved)"
    )
    if run.frozen_metrics:
        kept = {"dequantized": "what later stages saw, dequantized", "exact": "the exact weights it had when it froze"}
        yield (
            f"- Blocks were quantized to {config.schedule.on_freeze} when they froze, to give back memory; of each, "
            f"this export holds {kept[config.export.frozen]}"
        )
    yield from ("", "## Stages", "")
    yield f"| stage | steps | trains | parameters | {run.main_metric} |"
    yield "|---|---|---|---|---|"
    for stage in stages:
        trains = ", ".join(what_trains(stage.embeddings, stage.trainable_blocks, job.counts))
        metric = stage.metrics.get(run.main_metric)
        score = "" if metric is None else f"{metric:.4f}"
        first, last = stage.first_step + 1, stage.first_step + stage.steps
        yield f"| {stage.stage + 1}/{len(stages)} | {first}-{last} | {trains} | {stage.trainable_params:,} | {score} |"
    yield from ("", "## Metrics", "")
    for split, metrics in run.metrics.items():
        yield f"- {split}: {_scores(metrics)}"
    for kind, splits in run.frozen_metrics.items():
        here = ", as in this export" if kind == config.export.frozen else ""
        for split, metrics in splits.items():
            yield f"- {split}, frozen blocks {kind}{here}: {_scores(metrics)}"
    yield from ("", "## Versions", "")
    yield from (f"- {name} {version}" for name, version in run.versions.items())


def _method(job: Job) -> Iterator[str]:
    """What trained where not everything did, and how to load what is here."""
    method = job.config.method
    if method.kind == "full":
        return
    shape = {
        "adapter": f" ({method.placement}, reduction {method.reduction})",
        "ia3": "",
        "bitfit": " (biases)",
        "layernorm": " (normalization layers)",
    }.get(method.kind, f" (rank {method.rank}, alpha {method.alpha:g})")
    base = "" if method.quantization == "none" else f", on the base in {method.quantization} (bitsandbytes)"
    yield f"- Method: {method.kind}{shape}{base}"
    if method_of(method).uses_peft:
        yield "- Load: `peft.PeftModel.from_pretrained(base, folder)`, with the base model under this task's head"
    elif method.kind == "adapter":
        yield (
            "- Load: `progtuning_ds.methods.load_bottlenecks(base, Path(folder))`, with the base model under this "
            "task's head"
        )


def _scores(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _front_matter(job: Job) -> dict[str, object]:
    data = job.config.data
    method = job.config.method
    matter: dict[str, object] = {
        "library_name": "peft" if method_of(method).uses_peft else "transformers",
        "tags": ["progtuning", "deepspeed", *([] if method.kind == "full" else [method.kind])],
    }
    if _on_hub(job.config.model.path):
        matter["base_model"] = job.config.model.path
    if data.source and _on_hub(data.source):
        matter["datasets"] = [data.source]
    matter["metrics"] = [job.task.main_metric]
    return matter


def _on_hub(name: str) -> bool:
    """Whether a hub knows the name; a local path or the embedded default would mean nothing to it."""
    return name != "demo" and not Path(name).exists()


def _data(job: Job) -> str:
    data = job.config.data
    if data.train_file:
        return f"`{Path(data.train_file).name}`"
    return f"`{data.source or 'demo'}`" + (f" ({data.config_name})" if data.config_name else "")
