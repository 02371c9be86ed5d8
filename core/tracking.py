"""MLflow behind one small tracker: parameters, tags, data, metrics, pictures and clips of a run.

Calls return at once: a thread of its own talks to the store, so that a slow server never slows training. The same
metrics are appended to `metrics.jsonl` in the output directory first.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import queue
import shlex
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from core.slots import Recipe
from core.slots.slot import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAM_LIMIT = 6000
"""Characters of a value that MLflow keeps; longer ones are whole in recipe.json."""
DEFAULT_STORE = "sqlite:///runs/mlflow.db"
LINGER = 1.0
"""Seconds that metrics wait for more, so that they travel together."""

Point = tuple[dict[str, float], int, int]
"""Numbers by name, step, milliseconds since 1970."""
Item = Callable[[], None] | Point | None
"""What the tracker's thread is handed: a call, metrics, or None at the end."""


def store_uri(given: str | None = None) -> str:
    """The tracking URI: what was given, else $MLFLOW_TRACKING_URI, else a sqlite file under ./runs."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    if uri == DEFAULT_STORE:
        Path("runs").mkdir(exist_ok=True)
        return f"sqlite:///{Path('runs/mlflow.db').absolute()}"
    return uri


def client(uri: str) -> MlflowClient:
    """A client of the store. Raises UserError when it cannot be opened."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow.store.db.utils", "alembic"):  # migrations of a new sqlite file, a line each
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return MlflowClient(tracking_uri=uri)
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow store {uri}: {str(error).splitlines()[0]}") from None


def fetch_run(run_id: str, store: str | None = None) -> Any:
    """The MLflow run. Raises UserError when the store does not have it."""
    from mlflow.exceptions import MlflowException

    uri = store_uri(store)
    try:
        return client(uri).get_run(run_id)
    except MlflowException:
        raise UserError(
            f"run:{run_id}: the MLflow store {uri} has no such run (another store: --store or MLFLOW_TRACKING_URI)"
        ) from None


def fetch_output_dir(run_id: str, store: str | None = None) -> Path:
    """The output directory that a run noted. Raises UserError when it is not on this machine."""
    folder = Path(fetch_run(run_id, store).data.tags.get("output_dir", ""))
    if not folder.name or not folder.is_dir():
        raise UserError(f"run:{run_id}: its output directory {str(folder)!r} is not on this machine")
    return folder


def fetch_recipe_json(run_id: str, store: str | None = None) -> str:
    """The text of a run's recipe.json."""
    from mlflow.exceptions import MlflowException

    fetch_run(run_id, store)
    try:
        return Path(client(store_uri(store)).download_artifacts(run_id, "recipe.json")).read_text()
    except (MlflowException, OSError):
        raise UserError(f"run:{run_id} has no recipe.json among its artifacts") from None


class Tracker:
    """One MLflow run, fed by a thread. `close` waits a bounded time for it."""

    def __init__(self, client: MlflowClient, run_id: str, journal: Path) -> None:
        self.client, self.run_id = client, run_id
        self._journal = journal.open("a", buffering=1)
        self._queue: queue.Queue[Item] = queue.Queue(maxsize=100_000)
        self._thread = threading.Thread(target=self._ship, name="mlflow", daemon=True)
        self._warned = False
        self._thread.start()

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        now = int(time.time() * 1000)
        self._journal.write(json.dumps({"step": step, "time": now} | values) + "\n")
        self._put((values, step, now))

    def tags(self, values: dict[str, str]) -> None:
        """Set tags of the run."""
        for key, value in values.items():
            self._put(lambda k=key, v=value: self.client.set_tag(self.run_id, k, v))  # type: ignore[misc]

    def picture(self, image: Any, key: str, step: int) -> None:
        """Log a PIL image at a step, so that MLflow shows it as a series."""
        self._put(lambda: self.client.log_image(self.run_id, image, key=key, step=step))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or a folder with all in it."""
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        self._put(lambda: log(self.run_id, str(path), folder))

    def close(self, status: str, patience: float = 60.0) -> None:
        """Ship what is left, for at most `patience` seconds, and end the run as FINISHED, FAILED or KILLED."""
        self._put(lambda: self.client.set_terminated(self.run_id, status))
        self._put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            warnings.warn(
                f"MLflow did not take everything within {patience:.0f} s; all metrics are in {self._journal.name}",
                stacklevel=2,
            )
        self._journal.close()

    def _put(self, item: Item) -> None:
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._complain("the queue is full")

    def _ship(self) -> None:
        """The thread. Metrics wait up to LINGER seconds for company: a transaction a second, not one an update."""
        points: list[Point] = []
        deadline, item = math.inf, self._queue.get()
        while True:
            if isinstance(item, tuple):
                deadline = min(deadline, time.monotonic() + LINGER)
                points.append(item)
            if points and (not isinstance(item, tuple) or time.monotonic() >= deadline):
                self._try(functools.partial(self._ship_metrics, points))
                points, deadline = [], math.inf
            if item is None:
                return
            if callable(item):
                self._try(item)
            item = self._next(deadline)

    def _next(self, deadline: float) -> Item:
        """The next item, or an empty step to ship what waits when none comes before the deadline."""
        try:
            return self._queue.get(timeout=None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return lambda: None

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  any failure of the store is reported, none may stop the training
            self._complain(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _ship_metrics(self, points: list[Point]) -> None:
        """Send metrics in batches of at most 1,000, MLflow's limit."""
        from mlflow.entities import Metric

        metrics = [Metric(k, v, now, step) for values, step, now in points for k, v in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def _complain(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"MLflow does not take this run's data ({why}); training goes on, metrics are in {self._journal.name}",
                stacklevel=3,
            )


def open_run(
    recipe: Recipe,
    *,
    store: str | None,
    run_name: str,
    output_dir: Path,
    argv: Sequence[str],
    data: dict[str, dict[str, str | int]],
    resume: str | None,
) -> Tracker:
    """Create the MLflow run with all that is known before the first step, or go on in the run `resume`.

    `data` describes the datasets by context (`training`, `validation`). Raises UserError when the store cannot be
    reached.
    """
    from mlflow.exceptions import MlflowException

    uri = store_uri(store)
    try:
        mlflow = client(uri)
        run_id = resume or _create(mlflow, recipe, uri, run_name, output_dir, argv)
        if resume:
            mlflow.update_run(run_id, status="RUNNING")
        else:
            _describe(mlflow, run_id, recipe, output_dir, data)
    except MlflowException as error:
        raise UserError(f"MLflow store {uri}: {str(error).splitlines()[0]}") from None
    (output_dir / "run.json").write_text(json.dumps({"run_id": run_id, "store": uri, "run_name": run_name}))
    return Tracker(mlflow, run_id, output_dir / "metrics.jsonl")


def _create(
    mlflow: MlflowClient, recipe: Recipe, uri: str, run_name: str, output_dir: Path, argv: Sequence[str]
) -> str:
    name = recipe.tracking.experiment
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        # beside a local database, not in ./mlruns of whoever comes first
        beside = (
            Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / name
            if uri.startswith("sqlite:///")
            else None
        )
        experiment_id = mlflow.create_experiment(name, artifact_location=beside.as_uri() if beside else None)
    tags = _tags(recipe, output_dir, argv) | dict(tag.split("=", 1) for tag in recipe.tracking.tags)
    return str(mlflow.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)


def _describe(
    mlflow: MlflowClient, run_id: str, recipe: Recipe, output_dir: Path, data: dict[str, dict[str, str | int]]
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    params = [Param(k, str(v)[:PARAM_LIMIT]) for k, v in flatten(recipe).items()]
    for start in range(0, len(params), 100):
        mlflow.log_batch(run_id, params=params[start : start + 100])
    mlflow.log_artifact(run_id, str(output_dir / "recipe.json"))
    inputs = []
    for context, described in data.items():
        slot = recipe.data if context == "training" else recipe.validation_data
        dataset = Dataset(
            name=f"{type(slot).__name__} {context}",
            digest=str(described.get("fingerprint", ""))[:36],
            source_type="local",
            source=json.dumps({k: str(v) for k, v in flatten(slot).items()}),
            profile=json.dumps(described),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
    mlflow.log_inputs(run_id, inputs)


def _tags(recipe: Recipe, output_dir: Path, argv: Sequence[str]) -> dict[str, str]:
    commit, dirty = _git()
    return {
        "recipe": recipe.name,
        "mlflow.note.content": (type(recipe).__doc__ or "").strip(),
        "mlflow.source.git.commit": commit,
        "git.dirty": str(dirty),
        "command": shlex.join(["python", "-m", "registry", *argv]) if argv else "",
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "output_dir": str(output_dir.absolute()),
        "versions": json.dumps(versions()),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "torchvision", "diffusers", "transformers", "mlflow", "numpy", "xformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git() -> tuple[str, bool]:
    """Commit of the code that runs, and whether it is modified; ("", False) outside a checkout."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        print("git could not be asked for the commit; the run has no commit tag", file=sys.stderr)
        return "", False
