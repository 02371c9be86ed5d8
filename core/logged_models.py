"""Kept checkpoints on MLflow's page, each a LoggedModel with the metrics of its step and the datasets they are of.

A checkpoint is gigabytes and stays where it is: what is uploaded is a small `checkpoint.json` with its path, step and
hashes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.journal import NON_FINITE, Event
from core.mlflow_limits import METRICS, name, value

if TYPE_CHECKING:
    from mlflow import MlflowClient


def log_model(mlflow: MlflowClient, experiment: str, run_id: str, event: Event) -> None:
    """Log the checkpoint of an event, or finish what an interrupted sending began."""
    from mlflow.entities import LoggedModelOutput, Metric

    model = next((m for m in models(mlflow, experiment, run_id) if m.tags.get("path") == event["path"]), None)
    if model is None:
        facts = {"step": str(event["step"]), "recipe.hash": event["recipe_hash"]}
        tags = {"path": event["path"], "output_dir": event["output_dir"]}
        model = mlflow.create_logged_model(
            experiment, event["name"], source_run_id=run_id, tags=tags, params=facts, model_type="checkpoint"
        )
    points = [
        Metric(
            name(point["name"]),
            value(NON_FINITE.get(point["value"], point["value"])),
            point["time"],
            point["step"],
            model_id=model.model_id,
            dataset_name=point["dataset"][0],
            dataset_digest=point["dataset"][1],
            run_id=run_id,
        )
        for point in event["metrics"]
    ]
    for start in range(0, len(points), METRICS):
        mlflow.log_batch(run_id, metrics=points[start : start + METRICS])  # the run has these points: nothing doubles
    _upload(mlflow, model.model_id, event)
    outputs = mlflow.get_run(run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
        mlflow.log_outputs(run_id, [LoggedModelOutput(model.model_id, event["step"])])
    mlflow.finalize_logged_model(model.model_id, "READY")


def _upload(mlflow: MlflowClient, model_id: str, event: Event) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.json"
        path.write_text(json.dumps({k: event[k] for k in ("path", "output_dir", "step", "files")}, indent=1))
        mlflow.log_model_artifact(model_id, str(path))


def remove_stale(mlflow: MlflowClient, experiment: str, run_id: str, folder: Path) -> None:
    """Take models off the page whose checkpoints were not kept, unless there are none at all in this folder: a copy of
    the journal alone says nothing about them.
    """
    there = models(mlflow, experiment, run_id)
    gone = [model for model in there if not (folder / model.tags.get("path", "")).is_dir()]
    for model in gone if len(gone) < len(there) else []:
        mlflow.delete_logged_model(model.model_id)


def models(mlflow: MlflowClient, experiment: str, run_id: str) -> list[Any]:
    """The logged models of a run."""
    return list(mlflow.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"))
