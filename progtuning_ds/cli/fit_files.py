"""Owns the files of a fit: run configuration, DeepSpeed JSON, report and plot. No torch, no deepspeed."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from progtuning_ds.cli.fit import RUN, TASKS, Fit
from progtuning_ds.cli.fit_show import fit_content
from progtuning_ds.cli.plan import PlanRequest
from progtuning_ds.config import Hardware, RunConfig, load_deepspeed, project, run_config, settle
from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import Proposal, deepspeed_zero
from progtuning_ds.train.memory_plot import draw_stages

DEEPSPEED, PLAN, PLOT = "deepspeed.json", "plan.json", "memory.png"
_DATA = {
    "classification": {"train_file": "train.csv", "validation_fraction": 0.1},
    "causal_lm": {"train_file": "train.jsonl", "validation_fraction": 0.05},
    "token_classification": {"train_file": "train.jsonl", "validation_fraction": 0.1},
}
_HEADER = """\
# What `progtuning plan` found to fit. Put your own files and columns into `data` and `task`, then:
#   deepspeed --module progtuning_ds.train --config run.yaml
"""


def write_fit(fit: Fit, asked: PlanRequest, folder: Path) -> list[Path]:
    """Write the run that fits to a folder, as far as the training program can run it; without one, only the report.

    Raises:
        ConfigError: if the run has no whole number of epochs, which training needs.
    """
    written = [folder / PLAN]
    proposal = fit.outcome.proposal
    config = run_config(run_settings(fit, asked, proposal)) if proposal else None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(json.dumps(fit_content(fit), indent=2) + "\n")
    if config is None or proposal is None:
        return written
    if fit.report.head in TASKS:
        text = yaml.safe_dump(_said(run_settings(fit, asked, proposal)), sort_keys=False)
        (folder / RUN).write_text(f"{_HEADER}{text}", encoding="utf-8")
        written.append(folder / RUN)
    (folder / DEEPSPEED).write_text(json.dumps(complete_deepspeed(fit, config), indent=2) + "\n")
    draw_stages(
        folder / PLOT,
        [stage.footprint.device for stage in proposal.stages],
        [
            f"stage {index + 1}\n{stage.micro_batch} x {stage.accumulation} rows"
            for index, stage in enumerate(proposal.stages)
        ],
        title=f"{fit.report.architecture} on {fit.request.gpus} GPU(s): {proposal.choice}",
        budget=fit.request.budget.device,
        reserve=fit.request.budget.reserve,
    )
    return [*written, folder / DEEPSPEED, folder / PLOT]


def run_settings(fit: Fit, asked: PlanRequest, proposal: Proposal) -> dict[str, Any]:
    """The sections of a run configuration that a proposal decides, and names of files for the user's own."""
    micro = [stage.micro_batch for stage in proposal.stages]
    request, task = fit.request, _task(fit.report.head, fit.request.seq_len)
    return {
        "model": {
            "path": str(Path(asked.model).parent) if Path(asked.model).is_file() else asked.model,
            "num_labels": asked.num_labels,
            "attn_implementation": {"flash": "flash_attention_2"}.get(request.attention, request.attention),
            "gradient_checkpointing": proposal.choice.checkpointing,
            "blocks": asked.blocks,
        },
        "data": _DATA.get(task["kind"]),
        "task": task,
        "schedule": {
            "num_stages": len(proposal.stages),
            "embeddings": asked.embeddings,
            "stage_lengths": _lengths(asked),
            "length_unit": asked.length_unit,
            "always_train": list(asked.always_train),
            "on_freeze": request.on_freeze,
        },
        "train": {
            "epochs": _whole_epochs(asked.epochs),
            "global_batch_size": request.global_batch,
            "micro_batch_size": micro[0],
            "precision": request.precision,
        },
        "optimizer": {"kernel": "auto" if proposal.choice.kernel == "fused" else "deepspeed"},
        "deepspeed": _deepspeed(proposal),
        "memory": {
            "budget": request.budget.device,
            "reserve": request.budget.reserve,
            "micro_batch_sizes": micro if len(set(micro)) > 1 else None,
            "host_state": proposal.host_state,
            "reinvest": "unoffload" if proposal.unoffload else "none",
        },
        "output_dir": "runs/planned",
    }


def complete_deepspeed(fit: Fit, config: RunConfig) -> dict[str, Any]:
    """The JSON that DeepSpeed gets in the first stage, nothing left to fill in."""
    source = load_deepspeed(config.deepspeed)
    settings = settle(config, source, Hardware(fit.request.gpus, "cuda", bf16=True, fp16=True))
    hidden = fit.report.workload.shape.hidden if fit.report.workload.shape else None
    return project(config, source, settings, total_steps=1, warmup_steps=0, hidden_size=hidden)


def _deepspeed(proposal: Proposal) -> dict[str, Any]:
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    # Offload insists on DeepSpeed's own CPU Adam; elsewhere PyTorch's fused one needs no compiler.
    own = {} if proposal.choice.offload_optimizer else {"torch_adam": True, "fused": True}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": auto | own},
        "zero_optimization": deepspeed_zero(proposal.setup),
        "steps_per_print": 2000,
    }


def _said(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what is left to its default."""
    kept = {key: _said(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in kept.items() if value not in (None, [], {})}


def _task(head: str, seq_len: int) -> dict[str, Any]:
    """The section ``task`` for a head; columns and data are left to the user."""
    task: dict[str, Any] = {"kind": TASKS.get(head, "classification"), "max_length": seq_len}
    if task["kind"] == "squad":
        task["stride"] = min(128, seq_len // 3)
    return task


def _whole_epochs(text: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigError(f"epochs must be a whole number where a run configuration is written, got {text!r}")
    return int(text)


def _lengths(asked: PlanRequest) -> list[float] | None:
    return [float(Fraction(item)) for item in asked.stage_lengths.split(",")] if asked.stage_lengths else None
