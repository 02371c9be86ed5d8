"""The scores as a table (csv) and as the plot of distance against CLIP score over guidance."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from core.evaluation.judges import Features, Measured
from core.files import whole
from core.metrics import factored, frechet_distance, frechet_of_factors, kernel_distance, standard_distance

Row = dict[str, Any]
TABLE, PLOT = "scores.csv", "guidance.png"


def distances(found: Measured, real: Measured | None, given: Any, by: Features) -> dict[str, float]:
    """Fréchet and kernel distance to the real set, or the first alone to what is `given` of one, its mean and a factor
    of its covariance.
    """
    if given is not None:
        return {by.distance: frechet_of_factors(*factored(found.features), *given)}
    if real is None:
        return {}
    a, b = found.features, real.features
    if by.standardised:
        return {by.distance: standard_distance(a, b), by.kernel: kernel_distance(a, b)}
    return {by.distance: frechet_distance(a, b), by.kernel: kernel_distance(a, b)}


def clip_mean(found: Measured) -> dict[str, float]:
    """The mean CLIP score, where there is one."""
    return {"clip": float(found.clip.mean())} if len(found.clip) else {}


def write_table(file: Path, rows: Sequence[Row]) -> None:
    """A line a set. What a set has no value of is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with whole(file) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, names)
        table.writeheader()
        table.writerows(rows)


def shown(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table as text, with its head."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [tuple(names), *(tuple(_text(row.get(name)) for name in names) for row in rows)]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_plot(file: Path, rows: Sequence[Row], distance: str) -> bool:
    """Write `plot`. Returns whether there was anything to plot."""
    figure = plot(rows, distance)
    if figure is not None:
        figure.savefig(file, dpi=120)
    return figure is not None


def plot(rows: Sequence[Row], distance: str) -> Figure | None:
    """Distance against CLIP score, a point a guidance scale; against guidance itself where there is no CLIP. Baselines
    are lines.
    """
    guided = [row for row in rows if row["guidance"] is not None and distance in row]
    guided.sort(key=lambda row: float(row["guidance"]))
    if not guided:
        return None
    across = "clip" if all("clip" in row for row in guided) else "guidance"
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, y = (np.array([row[name] for row in guided], float) for name in (across, distance))
    axes.plot(x, y, "o-")
    for row, at in zip(guided, zip(x, y, strict=True), strict=True):
        axes.annotate(f"{row['guidance']:g}", at, textcoords="offset points", xytext=(5, 5))
    for row in rows:
        if row["guidance"] is None and distance in row:
            axes.axhline(row[distance], linestyle=":", color="grey")
            axes.text(0.01, row[distance], row["set"], transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    axes.set_xlabel("CLIP score" if across == "clip" else "guidance scale")
    axes.set_ylabel(distance.upper())
    return figure
