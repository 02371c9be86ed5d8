"""Runs without training: a real journal, a real store, and what they then hold."""

from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

from core.recipe_file import dump
from core.slots import Recipe
from core.tracker import Tracker, open_run
from registry import get

DATA = {
    "training": {"fingerprint": "0123456789abcdef", "samples": 96},
    "validation": {"fingerprint": "fedcba9876543210", "samples": 8},
}


def opened(out: Path, store: str | None, recipe: Recipe | None = None, name: str = "of-a-test", argv=()) -> Tracker:
    """Begin a run in `out`, or go on in it, as the training loop does."""
    recipe = recipe or get("lvdm-short-sky-tiny")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(dump(recipe))
    return open_run(recipe, store=store, run_name=name, output_dir=out, argv=argv, data=DATA, device="1 x cpu")


def checkpoint(tracker: Tracker, step: int) -> None:
    """What `Report.saved` says of a checkpoint, with a folder that is there."""
    path = tracker.folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    points = [
        {"name": k, "value": p.value, "step": p.step, "time": p.time, "dataset": ("FrameFolders training", "0123")}
        for k, p in tracker.journal.latest.items()
    ]
    tracker.append(
        "checkpoint",
        path=str(path.relative_to(tracker.folder)),
        step=step,
        name=f"{path.name}-lvdm-short-sky-tiny",
        output_dir=str(tracker.folder),
        recipe_hash="c0ffee",
        files={"state.json": {"sha256": "ab"}},
        metrics=points,
    )


def picture(tracker: Tracker, step: int, cell: int = 0) -> None:
    path = tracker.folder / "samples" / f"step-{step:08d}" / f"samples-{cell}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (320, 64), (step % 256, 40 * cell, 90)).save(path)
    tracker.picture(path, f"samples/{cell}", step)


def everything(tracker: Tracker, steps: int = 3) -> None:
    """One of each kind of event, and points of some steps."""
    for step in range(1, steps + 1):
        tracker.metrics({"loss": 1.0 / step, "lr": 1e-3}, step)
    tracker.metrics({"val/loss": 0.5}, steps)
    tracker.tags({"mood": "good"})
    picture(tracker, steps)
    (tracker.folder / "run.log").write_text("a line\n")
    tracker.artifact(tracker.folder / "run.log")
    checkpoint(tracker, steps)


def content(uri: str, run_id: str) -> dict:
    """All that a store holds of a run, but for what tells one store or one sending from another."""
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    models = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    return {
        "status": run.info.status,
        "name": run.info.run_name,
        "start": run.info.start_time,
        "params": run.data.params,
        "tags": {k: v for k, v in run.data.tags.items() if k != "heartbeat"},
        "metrics": {k: [points(client, run_id, k)] for k in run.data.metrics},
        "data": sorted((i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs),
        "artifacts": sorted(artifacts(client, run_id)),
        "models": sorted(
            (m.name, m.status, tuple(sorted((x.key, x.value, x.step) for x in m.metrics))) for m in models
        ),
        "outputs": len(run.outputs.model_outputs) if run.outputs else 0,
    }


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple]:
    """Step, time and value of every point, NaN as a text so that it equals itself."""
    history = client.get_metric_history(run_id, key)
    return [(p.step, p.timestamp, str(p.value) if p.value != p.value else p.value) for p in history]


def artifacts(client: MlflowClient, run_id: str, path: str | None = None) -> list[tuple[str, int]]:
    found = []
    for item in client.list_artifacts(run_id, path):
        found += artifacts(client, run_id, item.path) if item.is_dir else [(item.path, item.file_size)]
    return found


def runs_of(uri: str) -> list:
    """Every run in a store."""
    client = MlflowClient(tracking_uri=uri)
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))
