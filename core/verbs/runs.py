"""`runs`: the runs of the MLflow store in one line each, with the flags in which each differs from its recipe."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from core.errors import UserError
from core.redact import redact
from core.tracking import client, first_line, store_uri
from core.verbs.flags import RunsFlags
from core.verbs.printing import columns, emit

HEAD = ("run", "name", "status", "started (UTC)", "loss", "val/loss", "recipe", "recipe.delta")
PAGE = 1000


def runs(flags: RunsFlags) -> int:
    """Print the newest runs of the store."""
    found = list_runs(flags.store, flags.recipe, flags.limit)
    if flags.json:
        print(json.dumps(found, indent=2))
    elif found:
        head, *lines = columns([HEAD, *map(_row, found)])
        emit([(head, "bold"), *((line, "") for line in lines)])
    else:
        of = f" of {flags.recipe}" if flags.recipe else ""
        print(f"no run{of} is in the MLflow store {redact(store_uri(flags.store))}")
    return 0


def list_runs(store: str | None, recipe: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` runs of a recipe, or of all: id, name, status, start (milliseconds), recipe, delta, metrics.

    `recipe.delta` is the tag of that name: the shortest flags from the registered recipe to the run's, when it began.
    Raises UserError when the store does not answer.
    """
    mlflow = client(store_uri(store))
    from mlflow.exceptions import MlflowException

    wanted = f"tags.recipe = '{recipe}'" if recipe else "tags.recipe LIKE '%'"
    try:
        experiments = [e.experiment_id for e in mlflow.search_experiments()]
        found = mlflow.search_runs(
            experiments, wanted, max_results=min(limit, PAGE), order_by=["attributes.start_time DESC"]
        )
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow store {redact(store_uri(store))}: {first_line(error)}") from None
    return [_facts(run) for run in found]


def _facts(run: Any) -> dict[str, Any]:
    tags = run.data.tags
    return {
        "run": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "started": run.info.start_time,
        "recipe": tags["recipe"],
        "recipe.delta": tags.get("recipe.delta", ""),
        "metrics": {name: run.data.metrics[name] for name in ("loss", "val/loss") if name in run.data.metrics},
    }


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    started = datetime.fromtimestamp(run["started"] / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    values = [f"{run['metrics'][name]:.4g}" if name in run["metrics"] else "" for name in ("loss", "val/loss")]
    return run["run"], run["name"] or "", run["status"], started, *values, run["recipe"], run["recipe.delta"]
