"""How MLflow's page shows an experiment: a shared view, kept with the experiment, with the delta among the columns and
samples side by side among the charts.

MLflow's own table of runs shows no tags, and its picture charts are filled with the two hundred params of a run. A view
is what its Share button makes; `registry ui` prints the address.
"""

from __future__ import annotations

import json
from typing import Any

VIEW = "recipes"
TAG = f"mlflow.sharedViewState.{VIEW}"
CELLS = 8
"""Clips of a validation that are a series of pictures each."""
ROW = 4
"""Clips side by side in the grid of runs."""
COLORS = ("#077a9d", "#e65b77", "#8bca84", "#7c5cc4", "#f2a93b", "#1f3a93", "#b5651d", "#4bb8c9", "#c2185b", "#5d6d7e")
"""Of runs, in turn: MLflow's own are made from ids, and three runs may well be three reds."""
COLUMNS = {
    "tags.`recipe.delta`": 560,
    "metrics.`val/loss`": 90,
    "metrics.`loss`": 90,
    "tags.`recipe`": 180,
    "attributes.`Created`": 130,
    "attributes.`Duration`": 90,
    "attributes.`Models`": 240,
    "attributes.`Dataset`": 240,
}
"""Columns and their widths in pixels."""
CHARTS = ("loss", "val/loss", "lr", "grad_norm")
"""Metrics that come first; MLflow adds all others below."""


def experiment_tags() -> dict[str, str]:
    """What a new experiment is told about its page."""
    return {TAG: view(0), "mlflow.experimentKind": "custom_model_development"}


def next_color(last: str) -> str:
    """The color of a run, from that of the run before it."""
    return COLORS[(COLORS.index(last) + 1) % len(COLORS)] if last in COLORS else COLORS[0]


def view(step: int) -> str:
    """The shared view, as MLflow keeps it in a tag; its pictures are those of `step`, where the slider begins."""
    return json.dumps(
        {
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
            "selectedColumns": list(COLUMNS),
            "columnOrder": list(COLUMNS),
            "columnWidths": COLUMNS,
            "compareRunSections": [_section("samples", 1, 620), _section("losses", 2, 300)],
            "compareRunCharts": [_grid("samples", step), *_hidden(), *map(_line, CHARTS)],
            "isAccordionReordered": True,  # else MLflow sorts the sections by name
        }
    )


def _section(name: str, across: int, height: int) -> dict[str, Any]:
    shown = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": name, "name": name, "columns": across, "cardHeight": height} | shown


def _card(kind: str, title: str, section: str, **more: Any) -> dict[str, Any]:
    own = {"type": kind, "uuid": f"{section}-{title}", "metricSectionId": section, "displayName": title}
    return own | {"isGenerated": False, "deleted": False, "runsCountToCompare": 10} | more


def _grid(series: str, step: int) -> dict[str, Any]:
    """A row a run, a column a clip: the same noise in every row."""
    keys = [f"{series}/{cell}" for cell in range(ROW)]
    return _card("IMAGE", series, series, imageKeys=keys, step=step, showRunParams=False)


def _hidden() -> list[dict[str, Any]]:
    """The charts of single clips that MLflow would make, with all params in each."""
    keys = [f"{series}/{cell}" for series in ("samples", "reconstructions") for cell in range(CELLS)]
    return [_card("IMAGE", key, "samples", imageKeys=[key], step=0, showRunParams=False, deleted=True) for key in keys]


def _line(metric: str) -> dict[str, Any]:
    return _card(
        "LINE",
        metric,
        "losses",
        metricKey=metric,
        lineSmoothness=0,
        xAxisScaleType="linear",
        scaleType="linear",
        range={},
        xAxisKey="step",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        ignoreOutliers=False,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def address(server: str, experiment_id: str, charts: bool = False) -> str:
    """Where the page shows an experiment in this view, as a table or as charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    page = f"{server}/#/experiments/{experiment_id}/runs"
    return f"{page}?workflowType=machine_learning&viewStateShareKey={VIEW}{mode}"
