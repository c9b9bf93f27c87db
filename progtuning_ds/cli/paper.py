"""Owns the published parameter counts beside those computed here. May import torch and transformers; no deepspeed.

Published numbers are those of Progtuning (arXiv 2506.21119). Everything else is counted on models without weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from progtuning_ds.accounting import ComponentCounts, account
from progtuning_ds.blocks import component_counts, discover_blocks
from progtuning_ds.methods import Method, apply_method
from progtuning_ds.schedule import StagePlan, custom_plan, plan_stages

BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

METHOD_EPOCHS = 20
SHRINKING = (12, 10, 8, 6, 4)
"""Blocks of each stage of four epochs: a full-width first stage and equal steps down."""
NARROW = (6, 5, 4, 3, 2)
"""The same number of stages, begun at the upper half."""


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One setting; parameters summed over epochs.

    Attributes:
        setting: model, method and task.
        plan: what trains when.
        full: every epoch at full width, computed.
        progtuning: under the plan, computed.
        published_full: as the paper prints it, or None where it is not at hand.
        published_progtuning: likewise; a percentage stands for the part saved.
        verdict: whether the two agree at the precision of what is published, and how to read them.
    """

    setting: str
    plan: str
    full: int
    progtuning: int
    published_full: str | None
    published_progtuning: str | None
    verdict: str

    @property
    def saving(self) -> float:
        """Part of the updates that is saved, 0..1."""
        return 1 - self.progtuning / self.full


def paper_rows() -> list[PaperRow]:
    """Count every setting; takes a few seconds and no weights."""
    return [*_full_rows(), *_method_rows()]


def _full_rows() -> list[PaperRow]:
    return [
        _paper_schedule("BERT-base, full, GLUE", BERT_BASE, 3, "328.5M", "243.4M"),
        _paper_schedule("BERT-large, full, GLUE", BERT_LARGE, 3, "1005M", "703M"),
        _paper_schedule("BERT-base, full, SQuAD v1.1", BERT_BASE, 3, None, "26% fewer", squad=True),
        _paper_schedule("BERT-base, full, SQuAD v2.0", BERT_BASE, 2, None, "20% fewer", squad=True),
    ]


def _paper_schedule(
    setting: str,
    config: BertConfig,
    epochs: int,
    published_full: str | None,
    published: str,
    *,
    squad: bool = False,
) -> PaperRow:
    counts = _counts(config, Method(), BertForQuestionAnswering if squad else BertForSequenceClassification)
    plan = plan_stages(num_blocks=len(counts.blocks), num_stages=epochs, total_steps=epochs)
    return _row(setting, f"{epochs} epochs, T = {epochs}", counts, plan, published_full, published)


def _method_rows() -> list[PaperRow]:
    rows = []
    for name, method, published in (
        ("Adapter (Houlsby, reduction 16)", Method(kind="adapter"), ("35.8M", "11.9M")),
        ("BitFit", Method(kind="bitfit"), None),
        ("LoRA (rank 8 on query and value)", Method(kind="lora"), None),
    ):
        # As the published 35.8M does, these count the method's own parameters and leave the classifier out.
        counts = replace(_counts(BERT_BASE, method, BertForSequenceClassification), head=0)
        for widths, reading in (
            (SHRINKING, "published as what is left; this plan saves that much, and twice as much is left"),
            (NARROW, "stages start narrow: with a full first stage and equal steps at least half is left"),
        ):
            rows.append(
                _row(
                    f"BERT-base, {name}",
                    f"{METHOD_EPOCHS} epochs, {'-'.join(map(str, widths))} blocks",
                    counts,
                    _top_blocks(widths, METHOD_EPOCHS // len(widths)),
                    published[0] if published else None,
                    published[1] if published else None,
                    reading if published else "",
                )
            )
    return rows


def _top_blocks(widths: Sequence[int], epochs: int) -> StagePlan:
    """Stages of ``epochs`` steps that train the uppermost blocks."""
    num_blocks = len(_counts(BERT_BASE, Method(), BertForSequenceClassification).blocks)
    stages = [{"blocks": list(range(num_blocks - width, num_blocks)), "steps": epochs} for width in widths]
    return custom_plan(num_blocks, stages)


def _counts(config: BertConfig, method: Method, head: Any) -> ComponentCounts:
    with torch.device("meta"):
        model = apply_method(head(config), method)
    return component_counts(model, discover_blocks(model))


def _row(
    setting: str,
    plan_text: str,
    counts: ComponentCounts,
    plan: StagePlan,
    published_full: str | None,
    published: str | None,
    reading: str = "",
) -> PaperRow:
    run = account(counts, plan, steps_per_epoch=1)
    row = PaperRow(setting, plan_text, run.updated_params_full, run.updated_params, published_full, published, "")
    return replace(row, verdict=_verdict(row) + (f"; {reading}" if reading else ""))


def _verdict(row: PaperRow) -> str:
    """Compare at the precision of what was published, "328.5M" or "26% fewer"."""
    pairs = [
        (published, f"{row.saving:.0%} fewer" if published.endswith("fewer") else _millions(count, published))
        for published, count in ((row.published_full, row.full), (row.published_progtuning, row.progtuning))
        if published
    ]
    if not pairs:
        return "computed; the published figure is not at hand"
    return "agrees" if all(published == computed for published, computed in pairs) else "differs"


def _millions(count: int, like: str) -> str:
    digits = len(like.partition(".")[2].removesuffix("M"))
    return f"{count / 1e6:.{digits}f}M"


def show_paper(rows: Sequence[PaperRow], *, as_json: bool) -> None:
    """Print the rows as a table or as JSON."""
    if as_json:
        print(json.dumps([asdict(row) | {"saving": row.saving} for row in rows], indent=2))  # noqa: T201
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table("Setting", "Plan", "Published", "Computed", "Saved", "", title="Updated parameters over a run")
    for row in rows:
        published = f"{row.published_full or '?'} -> {row.published_progtuning or '?'}"
        computed = f"{row.full:,}\n-> {row.progtuning:,}"
        table.add_row(row.setting, row.plan, published, computed, f"{row.saving:.1%}", row.verdict)
    console.print(table)
