"""Draws predicted or measured memory, stacked by category, one bar per stage. Imports matplotlib when called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from progtuning_ds.memory import CATEGORIES, format_bytes

# Told apart without colour vision: Paul Tol's muted scheme, one colour for each category wherever it is drawn.
COLOURS = dict(
    zip(
        CATEGORIES,
        (
            "#332288",
            "#7F78C4",
            "#88CCEE",
            "#44AA99",
            "#117733",
            "#999933",
            "#DDCC77",
            "#AA4499",
            "#882255",
            "#CC6677",
            "#BBBBBB",
            "#666666",
        ),
        strict=True,
    )
)
_OTHER = "#DDDDDD"
_FAR = 4
GIB, MIB = 2**30, 2**20


def draw_stages(
    path: Path,
    bars: Sequence[Mapping[str, int]],
    labels: Sequence[str],
    *,
    title: str,
    budget: int | None = None,
    reserve: int = 0,
) -> None:
    """Write a PNG with one stacked bar per stage.

    Args:
        path: file to write.
        bars: bytes by category of each stage.
        labels: what stands under each bar.
        title: of the figure.
        budget: bytes of a rank's device, drawn as a line.
        reserve: of these, what is for no tensor; stacked on top.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.5, 1.6 * len(bars) + 3.5), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    stack_bars(axes, bars, labels, budget=budget, reserve=reserve)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def stack_bars(
    axes: Any, bars: Sequence[Mapping[str, int]], labels: Sequence[str], *, budget: int | None = None, reserve: int = 0
) -> None:
    """Draw the bars of ``draw_stages`` into axes of matplotlib."""
    highest = max(sum(bar.values()) for bar in bars)
    if budget is not None and budget > _FAR * (highest + reserve):
        budget, reserve = None, 0  # a line far above would flatten the bars
    highest = max(highest + reserve, budget or 0)
    unit, name = (GIB, "GiB") if highest >= GIB else (MIB, "MiB")
    places = range(len(bars))
    base = [0.0] * len(bars)
    known = [category for category in CATEGORIES if any(bar.get(category) for bar in bars)]
    strangers = sorted({category for bar in bars for category in bar if category not in CATEGORIES and bar[category]})
    for category in (*known, *strangers):
        heights = [bar.get(category, 0) / unit for bar in bars]
        colour = COLOURS.get(category, _OTHER)
        axes.bar(places, heights, 0.7, base, color=colour, edgecolor="white", label=category.replace("_", " "))
        base = [below + height for below, height in zip(base, heights, strict=True)]
    for place, height in zip(places, base, strict=True):
        axes.annotate(
            format_bytes(height * unit), (place, height + reserve / unit), ha="center", va="bottom", fontsize=9
        )
    if reserve:
        heights = [reserve / unit] * len(bars)
        axes.bar(places, heights, 0.7, base, color="none", edgecolor="#888888", hatch="///", label="reserve")
    if budget is not None:
        axes.axhline(
            budget / unit, color="black", linestyle="--", linewidth=1, label=f"budget {budget / unit:.4g} {name}"
        )
    axes.set_xticks(list(places), labels)
    axes.set_ylabel(f"{name} per rank")
    axes.set_ylim(0, 1.12 * highest / unit)
    axes.grid(axis="y", alpha=0.2)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
