"""MLflow's copy of a run, made from the journal. What is sent twice changes nothing, so whoever was cut off starts
again a little earlier: the thread of a training run, the next process after a kill, `registry sync`.

Metrics carry the journal's times, and MLflow drops a point that it has (same name, step, value and time). Params and
tags are values by name, artifacts files by path, pictures have names made from what they are, models are looked up.
"""

from __future__ import annotations

import json
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from core.journal import FILE_NAME, Event, read
from core.logged_models import log_model, remove_stale
from core.mlflow_limits import METRICS, PARAM_LIMIT, PARAMS, TAG_LIMIT, cut, name, value
from core.mlflow_page import TAG, experiment_tags, next_color, view
from core.redact import without_password
from core.run_facts import Synced, run_facts, write_facts
from core.tracking import client, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

Group = list[tuple[Event, int]]
"""Events of one kind, each with the offset at which it begins."""
EVENTS = 500
"""Events that are read at a time; the queue is the file."""
THUMBNAIL = 256
"""Longer side, in pixels, of the small copy that MLflow's grids show."""


class Abandoned(Exception):
    """Nobody waits for this sending any more."""


class Replica:
    """A run in one store. Nothing is sent before `connect`; every call may raise what MLflow raises."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri, self.store = folder, uri, without_password(uri)
        self.journal = folder / FILE_NAME
        self.run_id = ""
        self.skipped: list[str] = []
        """What could not be sent, ever: refused by MLflow, or a file that is gone."""
        self.abandoned = threading.Event()
        """Set by whoever waits no longer: nothing new is begun then, such as a run that someone else may be making."""
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._synced = Synced(folder, self.store)

    @property
    def noted_run(self) -> str:
        """The run in this store that took the journal before, if one did."""
        return self._synced.run_id

    @property
    def connected(self) -> bool:
        """Whether the run was found or made."""
        return bool(self.run_id)

    @property
    def mlflow(self) -> MlflowClient:
        """The client. Raises UserError for a store that cannot be opened."""
        if self._client is None:
            self._client = client(self.uri)
        return self._client

    def connect(self) -> None:
        """Find the run in the store by its id, or by its uid where a kill came before the id was noted, or make it."""
        begun = next((event for event, _ in read(self.journal) if event["event"] == "run"), None)
        if begun is None:
            raise UserError(f"{self.journal} does not say which run it is of")
        run = self._known() or self._found(begun)
        self._go_on()
        run = run or self._made(begun)
        self._experiment, run_id = run.info.experiment_id, run.info.run_id
        self._synced.belong(run_id)
        note_run_id(self.folder, self.store, run_id)
        self.run_id = run_id

    def _go_on(self) -> None:
        if self.abandoned.is_set():
            raise Abandoned

    def _known(self) -> Any:
        from mlflow.exceptions import MlflowException

        facts = run_facts(self.folder)
        run_id = self._synced.run_id or (facts.get("run_id") if facts.get("store") == self.store else None)
        if not run_id:
            return None
        try:
            return self.mlflow.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # a store that was made anew under the same name
                return None
            raise

    def _found(self, begun: Event) -> Any:
        experiment = self.mlflow.get_experiment_by_name(begun["experiment"])
        if experiment is None:
            return None
        runs = self.mlflow.search_runs([experiment.experiment_id], f"tags.uid = '{begun['uid']}'")
        return next(iter(runs), None)

    def _made(self, begun: Event) -> Any:
        made = experiment_id(self.mlflow, self.uri, begun["experiment"])
        before = self.mlflow.search_runs([made], max_results=1, order_by=["attributes.start_time DESC"])
        last = before[0].data.tags.get("mlflow.runColor", "") if before else ""
        described: dict[str, Any] = next(
            (event["values"] for event, _ in read(self.journal) if event["event"] == "tags"), {}
        )
        tags = described | _sign_of_life() | {"uid": begun["uid"], "mlflow.runColor": next_color(last)}
        return self.mlflow.create_run(made, start_time=begun["time"], tags=_tags(tags), run_name=begun["name"])

    # -------------------------------------------------------------------------------------------------------- shipping

    def left(self) -> int:
        """Lines that this store does not have."""
        return len(self._synced.owed) + sum(1 for _ in read(self.journal, self._synced.offset))

    def ship(self) -> int:
        """Send what is new, up to EVENTS events. Returns how many went; 0: nothing is left."""
        sent = 0
        for kind, group, end in self._groups():
            self._go_on()
            self._send(kind, group)
            self._synced.advance(end)
            sent += len(group)
        return sent

    def settle(self) -> None:
        """Try once more what the store did not take while it took the rest."""
        owed = self._synced.owed
        self._synced.owed = []
        for start in owed:
            for event, _ in islice(read(self.journal, start), 1):
                self._send(event["event"], [(event, start)])
        if owed:
            self._synced.owe(self._synced.owed)

    def _groups(self) -> Iterator[tuple[str, Group, int]]:
        """Neighbours of one kind together, metrics up to MLflow's limit of a request, with the offset behind them."""
        group: Group = []
        start = end = self._synced.offset
        points = 0
        for count, (event, offset) in enumerate(read(self.journal, start)):
            points += len(event.get("values", ()))
            if group and (event["event"] != group[0][0]["event"] or points > METRICS):
                yield group[0][0]["event"], group, end
                group, points = [], len(event.get("values", ()))
            group.append((event, end))
            end = offset
            if count >= EVENTS:
                break
        if group:
            yield group[0][0]["event"], group, end

    def _send(self, kind: str, group: Group) -> None:
        """All of a group, or one by one when something in it fails by itself: what MLflow refuses is left out, what
        fails while the store answers is owed. Raises when the store is down.
        """
        send: Callable[[list[Event]], None] | None = getattr(self, f"_send_{kind}", None)
        if send is None:  # a run's beginning is known from `connect`; kinds of a newer version are not ours to judge
            return
        try:
            send([event for event, _ in group])
        except Exception as error:  # noqa: BLE001  what a store raises is judged below
            if not is_refusal(error):
                self._probe(error)
            if len(group) > 1:
                for entry in group:
                    self._send(kind, [entry])
                return
            self.skipped.append(f"{kind}: {first_line(error)}")
            if not is_refusal(error):
                self._synced.owed.append(group[0][1])

    def _probe(self, error: Exception) -> None:
        """Raise `error` unless the store takes a sign of life, so that the fault is with what was sent."""
        try:
            self.beat()
        except Exception:  # noqa: BLE001  the first error says more
            raise error from None

    def beat(self) -> None:
        """Give a sign of life."""
        self.set_tags(_sign_of_life())

    def _send_metrics(self, events: list[Event]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name(k), value(v), e["time"], e["step"]) for e in events for k, v in e["values"].items()]
        for start in range(0, len(metrics), METRICS):
            self.mlflow.log_batch(self.run_id, metrics=metrics[start : start + METRICS])

    def _send_tags(self, events: list[Event]) -> None:
        self.set_tags({k: v for event in events for k, v in event["values"].items()})

    def set_tags(self, values: dict[str, str]) -> None:
        """Set tags now, beside the journal."""
        from mlflow.entities import RunTag

        for part in _parts([RunTag(k, v) for k, v in _tags(values).items()]):
            self.mlflow.log_batch(self.run_id, tags=part)

    def _send_params(self, events: list[Event]) -> None:
        """Params are written once in MLflow, so one that changed on resume becomes the tag `changed.<param>`."""
        from mlflow.entities import Param

        wanted = {name(k): cut(str(v), PARAM_LIMIT) for event in events for k, v in event["values"].items()}
        there = self.mlflow.get_run(self.run_id).data.params
        for part in _parts([Param(k, v) for k, v in wanted.items() if k not in there]):
            self.mlflow.log_batch(self.run_id, params=part)
        changed = {k: v for k, v in wanted.items() if k in there and there[k] != v}
        self.set_tags({f"changed.{k}": f"{v} (first {there[k]})" for k, v in changed.items()})

    def _send_data(self, events: list[Event]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=each["name"],
                    digest=each["digest"],
                    source_type="local",
                    source=json.dumps(each["source"]),
                    profile=json.dumps(each["profile"]),
                ),
                [InputTag("mlflow.data.context", each["context"])],
            )
            for event in events
            for each in event["sets"]
        ]
        self.mlflow.log_inputs(self.run_id, inputs)

    def _send_artifact(self, events: list[Event]) -> None:
        for event in events:
            path = self.folder / event["path"]
            if self._is_there(path):
                log = self.mlflow.log_artifacts if path.is_dir() else self.mlflow.log_artifact
                log(self.run_id, str(path), event.get("folder"))

    def _send_picture(self, events: list[Event]) -> None:
        """The file names are those by which MLflow's page knows a series, with a uuid that the next sending has too."""
        with tempfile.TemporaryDirectory() as folder:
            for event in events:
                if self._is_there(self.folder / event["path"]):
                    _write_picture(self.folder / event["path"], Path(folder), event)
            if any(Path(folder).iterdir()):
                self.mlflow.log_artifacts(self.run_id, folder, "images")
                self.set_tags({"mlflow.loggedImages": "True"})
                self.mlflow.set_experiment_tag(self._experiment, TAG, view(max(event["step"] for event in events)))

    def _send_checkpoint(self, events: list[Event]) -> None:
        for event in events:
            if (self.folder / event["path"]).is_dir():  # else it was not kept
                log_model(self.mlflow, self._experiment, self.run_id, event)
        remove_stale(self.mlflow, self._experiment, self.run_id, self.folder)

    def _send_state(self, events: list[Event]) -> None:
        status, end = events[-1]["status"], events[-1]["time"]
        if status == "RUNNING":
            self.mlflow.update_run(self.run_id, status=status)
            return
        self.settle()
        remove_stale(self.mlflow, self._experiment, self.run_id, self.folder)
        self.mlflow.set_terminated(self.run_id, status, end)

    def _is_there(self, path: Path) -> bool:
        """Whether a file of the run can be sent: nothing else of this machine is, whatever links there are."""
        if not path.exists():
            self.skipped.append(f"{path} is gone")
            return False
        leaves = [each for each in (path, *path.rglob("*")) if not _within(each, self.folder)]
        if leaves:
            self.skipped.append(f"{leaves[0]} leads out of {self.folder}")
        return not leaves


def _within(path: Path, folder: Path) -> bool:
    """Whether the file itself, behind all links, lies in the folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + PARAMS] for start in range(0, len(items), PARAMS))


def _sign_of_life() -> dict[str, str]:
    return {"heartbeat": datetime.now(UTC).isoformat(timespec="seconds")}


def _tags(values: dict[str, Any]) -> dict[str, str]:
    """As MLflow takes them."""
    return {name(k): cut(str(v), TAG_LIMIT) for k, v in values.items()}


def is_refusal(error: Exception) -> bool:
    """Whether sending it again would be refused again."""
    if isinstance(error, OSError):  # an answer of HTTP among them: too large, or not understood
        return getattr(getattr(error, "response", None), "status_code", 0) in (400, 413, 422)
    if hasattr(error, "error_code"):
        return error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
    return isinstance(error, (ValueError, TypeError, KeyError))


def experiment_id(mlflow: MlflowClient, uri: str, title: str) -> str:
    """The experiment called so, made if need be. Beside a sqlite file its artifacts lie beside the file, not in
    ./mlruns of whoever comes first.
    """
    from mlflow.exceptions import MlflowException

    experiment = mlflow.get_experiment_by_name(title)
    if experiment is None:
        path = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / name(title)
        beside = path.as_uri() if uri.startswith("sqlite:///") else None
        try:
            return str(mlflow.create_experiment(title, artifact_location=beside, tags=experiment_tags()))
        except MlflowException as error:
            experiment = mlflow.get_experiment_by_name(title)  # another run was faster
            if experiment is None:
                raise error
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {title!r} was deleted: restore it (mlflow experiments restore), or name another "
            "with --tracking.experiment"
        )
    return str(experiment.experiment_id)


def _write_picture(source: Path, folder: Path, event: Event) -> None:
    from PIL import Image

    series = name(event["key"]).replace("/", "~")
    same = uuid.uuid5(uuid.NAMESPACE_URL, f"{event['key']} {event['step']} {event['time']}")
    stem = f"{series}+step+{event['step']}+timestamp+{event['time']}+{same}"
    with Image.open(source, formats=("PNG",)) as image:
        image.save(folder / f"{stem}.png")
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(folder / f"{stem}+compressed.webp")


def note_run_id(folder: Path, store: str, run_id: str) -> None:
    """Write the id into run.json, if that store is the run's own."""
    facts = run_facts(folder)
    if facts.get("store", store) == store and facts.get("run_id") != run_id:
        write_facts(folder, facts | {"store": store, "run_id": run_id})
