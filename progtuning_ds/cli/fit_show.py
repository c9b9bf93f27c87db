"""Owns how a fit is shown: table, words and JSON. No torch, no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from progtuning_ds.cli.fit import Fit
from progtuning_ds.cli.plan import report_content
from progtuning_ds.memory import CATEGORIES, Failure, Footprint, Proposal, format_bytes, least_memory

GROUPS = {
    "Weights": ("weights", "quantized_weights"),
    "Optim.": ("master_weights", "exp_avg", "exp_avg_sq", "other_state"),
    "Grads": ("gradients", "buckets"),
    "Activ.": ("activations", "logits"),
    "Other": ("gathered", "step"),
}
_SHOWN_FAILURES = 8
_LARGE = 8 * 2**30
"""From so many bytes of a GPU on a tenth of a GiB is fine enough."""


def fit_content(fit: Fit) -> dict[str, Any]:
    """The plan's JSON with the fit beside it; bytes."""
    request, budget = fit.request, fit.request.budget
    proposal = fit.outcome.proposal
    return {
        **report_content(fit.report),
        "request": {
            "gpus": request.gpus,
            "memory_bytes": budget.device,
            "reserve_bytes": budget.reserve,
            "host_memory_bytes": budget.host,
            "seq_len": request.seq_len,
            "global_batch": request.global_batch,
            "precision": request.precision,
            "attention": request.attention,
            "on_freeze": request.on_freeze,
        },
        "fits": proposal is not None,
        "proposal": _proposal_content(proposal) if proposal else None,
        "failures": [_failure_content(failure) for failure in fit.outcome.failures],
        "remedies": [remedy.words for remedy in fit.remedies],
        "notes": list(fit.notes),
    }


def print_fit(fit: Fit) -> None:
    """Print the fit for people, below the plan's own table."""
    console = Console(highlight=False)
    request, budget = fit.request, fit.request.budget
    console.print()
    console.print(
        f"{request.gpus} GPU(s) of {format_bytes(budget.device)}, {format_bytes(budget.reserve)} of it in reserve; "
        f"{request.global_batch} rows of {request.seq_len} tokens a step, {request.precision}, {request.attention} "
        "attention",
        markup=False,
    )
    for note in fit.notes:
        console.print(f"Note: {note}", markup=False)
    if fit.outcome.proposal:
        _print_proposal(console, fit, fit.outcome.proposal)
    else:
        _print_nothing(console, fit)


def _print_proposal(console: Console, fit: Fit, proposal: Proposal) -> None:
    console.print(f"[bold]Cheapest that fits every stage: {proposal.choice}[/bold]")
    table = _table("GiB per rank at the peak; rows are rows per pass x passes per step")
    for column in ("Stage", "Rows", *GROUPS, "Peak", "Free", "Host"):
        table.add_column(column, justify="left" if column == "Stage" else "right", no_wrap=True)
    count, digits = len(proposal.stages), 1 if fit.request.budget.device >= _LARGE else 2
    for index, stage in enumerate(proposal.stages):
        footprint = stage.footprint
        held = [_sum(footprint, names) for names in GROUPS.values()]
        held += [footprint.peak, fit.request.budget.usable - footprint.peak, footprint.host_total]
        cells = (f"{size / 2**30:.{digits}f}" if size else "-" for size in held)
        table.add_row(f"{index + 1}/{count}", f"{stage.micro_batch} x {stage.accumulation}", *cells)
    console.print(table)
    console.print(
        f"Cost of a step: {proposal.cost:,.0f} tokens of compute per rank, "
        f"{fit.request.rows_per_rank * fit.request.seq_len:,} of them rows; the rest is recomputation, "
        "communication, the optimizer and host traffic."
    )
    if fit.outcome.failures:
        console.print("Could have been cheaper, but does not fit:")
        _print_failures(console, fit.outcome.failures)


def _print_nothing(console: Console, fit: Fit) -> None:
    console.print("[bold]Nothing fits.[/bold] Tried, cheapest first, at one row per pass:")
    _print_failures(console, fit.outcome.failures, limit=len(fit.outcome.failures))
    nearest = least_memory(fit.outcome.failures, fit.request.budget)
    console.print("What would fit:")
    if nearest is not None:
        console.print(f"  GPUs of at least {format_bytes(nearest[1])}: {nearest[0]}", markup=False)
    for remedy in fit.remedies:
        console.print(f"  {remedy.words}", markup=False)
    if not fit.remedies:
        console.print("  no single change of GPUs (up to 1024), sequence length or LoRA is enough")


def _print_failures(console: Console, failures: Sequence[Failure], limit: int = _SHOWN_FAILURES) -> None:
    table = _table()
    for column in ("Configuration", "Stage", "Needs", "Over by", "Most of it"):
        table.add_column(column, justify="left" if column == "Configuration" else "right")
    for failure in failures[:limit]:
        name, size = failure.largest
        needs = failure.footprint.peak if failure.where == "device" else failure.footprint.host_total
        place = "" if failure.where == "device" else " (host)"
        table.add_row(
            str(failure.choice),
            str(failure.stage + 1),
            format_bytes(needs) + place,
            format_bytes(failure.missing),
            f"{name.replace('_', ' ')} {format_bytes(size)}",
        )
    console.print(table)
    if len(failures) > limit:
        console.print(f"  and {len(failures) - limit} more (--json lists all)")


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )


def _sum(footprint: Footprint, names: Sequence[str]) -> int:
    return sum(footprint.device.get(name, 0) for name in names)


def _proposal_content(proposal: Proposal) -> dict[str, Any]:
    choice = proposal.choice
    return {
        "zero_stage": choice.zero_stage,
        "offload_optimizer": choice.offload_optimizer,
        "offload_param": choice.offload_param,
        "checkpointing": choice.checkpointing,
        "kernel": choice.kernel,
        "host_state": proposal.host_state,
        "reinvest": "unoffload" if proposal.unoffload else "none",
        "cost_tokens": proposal.cost,
        "stages": [
            {
                "index": index,
                "micro_batch": stage.micro_batch,
                "accumulation": stage.accumulation,
                "host_parts": list(stage.host_parts),
                "peak_bytes": stage.footprint.peak,
                "peak_moment": stage.footprint.peak_moment,
                "device_bytes": _by_category(stage.footprint.device),
                "host_bytes": dict(stage.footprint.host),
                "cost_tokens": stage.cost,
            }
            for index, stage in enumerate(proposal.stages)
        ],
    }


def _failure_content(failure: Failure) -> dict[str, Any]:
    return {
        "configuration": str(failure.choice),
        "stage": failure.stage,
        "where": failure.where,
        "missing_bytes": failure.missing,
        "device_bytes": _by_category(failure.footprint.device),
        "host_bytes": dict(failure.footprint.host),
    }


def _by_category(held: Any) -> dict[str, int]:
    return {name: held[name] for name in CATEGORIES if held.get(name)}
