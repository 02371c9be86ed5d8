"""Journals from anywhere: a line is an event or left out, and what is sent to MLflow is of the run's own folder."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image

from core.errors import UserError
from core.events import KINDS
from core.journal import FILE_NAME, LONGEST, Journal, read
from core.replica import Replica
from core.run_facts import SYNCED, Synced, run_facts
from core.verbs.sync import send
from tests.fuzz.hostile import altered, bounded, changed, keeping, kept, outcome, untouched

EVENTS = [
    {"event": "run", "time": 1, "uid": "0123abcd", "name": "a run", "experiment": "sky"},
    {"event": "state", "time": 2, "status": "RUNNING"},
    {"event": "params", "time": 3, "values": {"optim.lr": "0.1"}},
    {"event": "data", "time": 4, "sets": [{"context": "training", "name": "a", "digest": "b", "source": {}, "profile": {}}]},
    {"event": "metrics", "time": 5, "step": 1, "values": {"loss": 0.5, "grad_norm": "NaN"}},
    {"event": "artifact", "time": 6, "path": "recipe.json", "folder": None},
    {"event": "picture", "time": 7, "path": "a.png", "key": "samples", "step": 1},
    {"event": "tags", "time": 9, "values": {"a": "b"}},
    {"event": "state", "time": 10, "status": "FINISHED"},
]  # fmt: skip


def lines(events):
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def attempt(content):
    """Read, open, write a line, read again: it is there, and what was there before."""
    with tempfile.TemporaryDirectory() as around, keeping("journal", content):
        path = Path(around) / "run" / FILE_NAME
        path.parent.mkdir()
        path.write_bytes(content)
        with untouched(Path(around)):
            before = [event for event, _ in read(path)]
        journal = Journal(path)
        journal.metrics({"loss": 1.0}, 2**62)
        journal.append("tags", values={"after": "all"})
        journal.close()
        after = [event for event, _ in read(path)]
        assert after[: len(before)] == before and after[-1]["values"] == {"after": "all"}
        assert sorted(p.name for p in path.parent.iterdir()) == [FILE_NAME]
        for event in after:
            assert all(name in event for name in KINDS.get(event["event"], ()))


@bounded(150)
@given(altered(EVENTS))
def test_a_journal_of_which_events_are_something_else_is_read_and_goes_on(content):
    events = json.loads(content)
    attempt(lines(events if isinstance(events, list) else [events]))


@bounded(150)
@given(changed([lines(EVENTS)]))
def test_a_journal_whose_bytes_were_changed_is_read_and_goes_on(content):
    attempt(content)


@pytest.mark.parametrize(
    "content", [b"", b"\n\n\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"null\n", b"9" * 5000 + b"\n", b"\0" * 4096]
)
def test_what_is_no_journal_is_an_empty_one(content):
    attempt(content)


def test_what_failed_once_is_read_and_goes_on():
    for path in kept("journal"):
        attempt(path.read_bytes())


def test_a_line_that_is_too_long_is_left_out_and_those_behind_it_are_read(tmp_path):
    path = tmp_path / FILE_NAME
    with path.open("wb") as file:
        file.write(lines(EVENTS[:1]))
        file.seek(3 * LONGEST + 17, os.SEEK_CUR)  # a hole: zeros
        file.write(b"\n" + lines(EVENTS[1:2]))
    assert [event["event"] for event, _ in read(path)] == ["run", "state"]


@bounded(60)
@given(altered({"sqlite:///a.db": {"run_id": "a", "offset": 10, "owed": [0]}}))
def test_an_account_of_what_was_sent_that_is_none_counts_as_nothing_sent(content):
    with tempfile.TemporaryDirectory() as folder, keeping("synced", content):
        (Path(folder) / SYNCED).write_bytes(content)
        (Path(folder) / "run.json").write_bytes(content)
        (Path(folder) / FILE_NAME).write_bytes(lines(EVENTS))
        found = Synced(Path(folder), "sqlite:///a.db")
        assert 0 <= found.offset <= len(lines(EVENTS)) and isinstance(found.run_id, str)
        assert all(isinstance(fact, str | bool) for fact in run_facts(Path(folder)).values())


# ---------------------------------------------------------------------------------------------- what is sent to MLflow


@pytest.fixture
def foreign(tmp_path, _migrated_store):
    """A run's folder as it came from someone else, a secret beside it, and a store of one's own."""
    shutil.copy(_migrated_store, tmp_path / "mlflow.db")
    (tmp_path / "secret.txt").write_text("a secret")
    folder = tmp_path / "theirs"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "recipe.json").write_text("{}")
    return folder


def sent(folder, events):
    """Send these events; returns what MLflow's artifacts hold."""
    (folder / FILE_NAME).write_bytes(lines(events))
    replica = Replica(folder, f"sqlite:///{folder.parent}/mlflow.db")
    found = outcome(lambda: send(replica))
    everything = [p for p in folder.parent.rglob("*") if p.is_file() and folder not in p.parents]
    return found, {p.relative_to(folder.parent).as_posix(): p.read_bytes() for p in everything}


def test_the_events_above_are_sent(foreign):
    found, files = sent(foreign, EVENTS)
    assert found == len(EVENTS) and any(name.endswith("recipe.json") for name in files)
    client = MlflowClient(tracking_uri=f"sqlite:///{foreign.parent}/mlflow.db")
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 0.5


@pytest.mark.parametrize(
    "event",
    [
        {"event": "artifact", "path": "../secret.txt", "folder": None},
        {"event": "artifact", "path": "link.txt", "folder": None},
        {"event": "artifact", "path": "linked", "folder": None},
        {"event": "artifact", "path": "recipe.json", "folder": "../../.."},
        {"event": "picture", "path": "../secret.txt", "key": "samples", "step": 1},
        {"event": "picture", "path": "a.png", "key": "../../x", "step": 1},
        {"event": "picture", "path": "a.png", "key": "x", "step": "/../../../../x"},
        {"event": "run", "uid": "' OR '' = '", "name": "x", "experiment": "y"},
    ],
    ids=lambda event: "-".join(str(v) for v in event.values()),
)
def test_nothing_beside_the_runs_folder_is_sent_or_written_whatever_a_journal_says(foreign, event):
    (foreign / "link.txt").symlink_to(foreign.parent / "secret.txt")
    (foreign / "linked").mkdir()
    (foreign / "linked" / "link.txt").symlink_to(foreign.parent / "secret.txt")
    found, files = sent(foreign, [*EVENTS[:2], {"time": 3} | event, *EVENTS[-1:]])
    assert not isinstance(found, UserError)
    assert all(name == "secret.txt" or b"a secret" not in content for name, content in files.items())
    assert {name.split("/")[0] for name in files} <= {"secret.txt", "mlflow.db", "mlartifacts"}


def test_an_experiment_with_an_odd_name_has_its_artifacts_beside_the_database(foreign):
    begun = EVENTS[0] | {"experiment": "../../elsewhere"}
    _, files = sent(foreign, [begun, *EVENTS[1:]])
    assert {name.split("/")[0] for name in files} <= {"secret.txt", "mlflow.db", "mlartifacts"}
    assert not (foreign.parents[1] / "elsewhere").exists() and not (foreign.parents[2] / "elsewhere").exists()


@bounded(15)
@given(data=st.data())
def test_any_journal_is_sent_as_far_as_it_can_be(data, _migrated_store):
    content = data.draw(altered(EVENTS[1:]))
    events = json.loads(content)
    with tempfile.TemporaryDirectory() as around, keeping("sent", content):
        shutil.copy(_migrated_store, Path(around) / "mlflow.db")
        folder = Path(around) / "theirs"
        folder.mkdir()
        sent(folder, [EVENTS[0], *(events if isinstance(events, list) else [events])])
