"""A server over HTTP, with and without a password, holds what a sqlite file holds; one that fails stops nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

import registry
from core import tracker as tracker_module
from core.errors import UserError
from core.run_facts import run_facts
from core.tracker import Tracker
from tests.tracking.conftest import PASSWORD
from tests.tracking.running import content, everything, opened, points, runs_of
from tests.tracking.servers import deaf, free_port, slow


def one_run(out: Path, store: str | None) -> str:
    tracker = opened(out, store)
    everything(tracker)
    tracker.close("FINISHED")
    return tracker.run_id


def compared(uri: str, run_id: str) -> dict:
    """Content without what differs between two runs: times, and what names the folder."""
    found = content(uri, run_id)
    here = ("uid", "output_dir", "mlflow.note.content", "mlflow.runColor")
    found["tags"] = {k: v for k, v in found["tags"].items() if k not in here}
    found["metrics"] = {k: [(step, value) for step, _, value in v[0]] for k, v in found["metrics"].items()}
    found["artifacts"] = [path.partition("+timestamp")[0] for path, _ in found["artifacts"]]
    return found | {"start": 0}


def test_sqlite_http_and_basic_auth_hold_the_same(tmp_path, store, http, guarded, monkeypatch):
    monkeypatch.setattr(tracker_module, "EXIT_WAIT", 60.0)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    runs = {uri: one_run(tmp_path / str(n), uri) for n, uri in enumerate((store, http, guarded[0]))}
    found = [compared(uri, run_id) for uri, run_id in runs.items()]
    assert found[0]["metrics"]["loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)] and found[0]["models"]
    assert found[1] == found[0] and found[2] == found[0]


def test_a_password_in_the_uri_works_and_is_in_no_file_of_the_run(tmp_path, guarded, monkeypatch):
    address, _ = guarded
    uri = address.replace("//", f"//admin:{PASSWORD}@")
    first = opened(tmp_path / "run", uri)
    everything(first)
    first.close("KILLED")
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or PASSWORD.encode() not in file.read_bytes(), file
    assert run_facts(tmp_path / "run")["store"] == address
    with pytest.raises(UserError, match=r"password is not kept in run\.json: set.*MLFLOW_TRACKING_PASSWORD.*--store"):
        opened(tmp_path / "run", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    again = opened(tmp_path / "run", None)
    again.close("FINISHED")
    assert again.run_id == first.run_id


@pytest.mark.parametrize("user", ["", "admin:wrong-password@"])
def test_a_wrong_password_is_one_error_at_the_start_that_says_what_to_set(tmp_path, guarded, user):
    with pytest.raises(UserError, match=r"not authenticated.*MLFLOW_TRACKING_USERNAME") as caught:
        opened(tmp_path / "run", guarded[0].replace("//", f"//{user}"))
    assert "wrong-password" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://", "names no host"),
        ("http://host:port/", "Port could not be cast"),
        ("htp://host:5000", r"unknown scheme 'htp' \(did you mean 'http'"),
        ("./mlruns", "writes no folders any more; take sqlite"),
        ("file:///tmp/mlruns", "writes no folders any more; take sqlite"),
        ("sqlite:///", "names no database"),
        ("sqlite:////proc/none/mlflow.db", "MLflow store sqlite"),
    ],
)
def test_a_wrong_uri_is_one_clear_error_at_the_start(tmp_path, uri, says):
    with pytest.raises(UserError, match=says) as caught:
        opened(tmp_path / "run", uri)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_no_mlflow_is_one_clear_error_at_the_start(tmp_path, http):
    with pytest.raises(UserError, match=r"MLflow store http://127.*no MLflow server is there"):
        opened(tmp_path / "run", f"{http}/no/such/place")


# ---------------------------------------------------------------------------------------------- dead, deaf and slow ones


def timed(out: Path, uri: str, steps: int = 200) -> tuple[Tracker, float, float]:
    """A run with some steps, and the seconds that its start and its end took."""
    times = [time.monotonic()]
    tracker = opened(out, uri)
    times.append(time.monotonic())
    everything(tracker, steps)
    times.append(time.monotonic())
    tracker.close("FINISHED")
    return tracker, times[1] - times[0], time.monotonic() - times[2]


def test_a_dead_server_delays_neither_start_nor_end_and_sync_brings_all_when_it_is_up(tmp_path, http, capsys):
    port = free_port()
    uri, out = f"http://127.0.0.1:{port}", tmp_path / "run"
    _, started, ended = timed(out, uri)
    said = capsys.readouterr().err
    assert f"MLflow at {uri} does not take this run's data" in said and "training goes on" in said
    assert f"python -m registry sync {out}" in said
    assert registry.main(["sync", str(out)]) == 1 and "lines are left" in capsys.readouterr().out
    with slow(http, 0.0, port):
        began = time.monotonic()
        assert registry.main(["sync", str(out)]) == 0
        took = time.monotonic() - began
        assert "lines sent in" in capsys.readouterr().out
        run_id = run_facts(out)["run_id"]
        found = content(uri, run_id)
        assert found["status"] == "FINISHED" and len(found["metrics"]["loss"][0]) == 200 and found["models"]
        assert registry.main(["sync", str(out)]) == 0 and "nothing was missing" in capsys.readouterr().out
        assert content(uri, run_id) == found
    assert len([run for run in runs_of(http) if run.data.tags["uid"] == run_facts(out)["uid"]]) == 1
    print(f"dead server: start {started:.2f} s, exit {ended:.2f} s, sync of 200 steps {took:.2f} s")
    assert ended < tracker_module.EXIT_WAIT + 5


def test_a_deaf_server_delays_start_and_end_by_what_is_allowed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracker_module, "OPEN_WAIT", 1.0)
    monkeypatch.setattr(tracker_module, "EXIT_WAIT", 2.0)
    with deaf() as uri:
        _, started, ended = timed(tmp_path / "run", uri)
    said = capsys.readouterr().err
    assert "it does not answer" in said and f"registry sync {tmp_path / 'run'}" in said
    assert 1.0 <= started < 10 and 2.0 <= ended < 10  # its own timeout is 30 s, MLflow's 120 s eight times over
    print(f"deaf server: start {started:.2f} s, exit {ended:.2f} s of 2 s allowed")


def test_a_slow_server_gets_what_it_can_by_the_end_and_the_rest_by_sync(tmp_path, http, capsys, monkeypatch):
    monkeypatch.setattr(tracker_module, "EXIT_WAIT", 2.0)
    with slow(http, 1.0) as uri:
        tracker, _, ended = timed(tmp_path / "run", uri, steps=2500)
    assert ended < 10 and f"registry sync {tmp_path / 'run'}" in capsys.readouterr().err
    print(f"slow server (1 s an answer): exit {ended:.2f} s of 2 s allowed, {tracker.replica.left()} lines left")
    assert registry.main(["sync", str(tmp_path / "run"), "--store", http]) == 0
    run = next(run for run in runs_of(http) if run.data.tags["uid"] == run_facts(tmp_path / "run")["uid"])
    history = points(MlflowClient(tracking_uri=http), run.info.run_id, "loss")
    assert [step for step, *_ in history] == list(range(1, 2501)) and run.info.status == "FINISHED"


def test_a_server_that_comes_back_during_the_run_gets_everything_without_a_sync(tmp_path, http, capsys, monkeypatch):
    port = free_port()
    monkeypatch.setattr(tracker_module, "LONGEST_PAUSE", 1.0)
    tracker = opened(tmp_path / "run", f"http://127.0.0.1:{port}")
    everything(tracker)
    with slow(http, 0.0, port):
        end = time.monotonic() + 240
        while tracker.replica.left() and time.monotonic() < end:
            time.sleep(0.2)
        tracker.close("FINISHED")
    assert content(http, tracker.run_id)["status"] == "FINISHED"
    said = capsys.readouterr().err
    assert said.count("does not take this run's data") == 1 and "answers again" in said and "lacks" not in said


def test_telemetry_is_off_and_the_patience_with_servers_short_unless_the_user_says_otherwise():
    code = (
        "import os; from core.tracking import client; client('http://127.0.0.1:9'); "
        "from mlflow.telemetry.client import get_telemetry_client as get; "
        "print(get(), [os.environ['MLFLOW_HTTP_REQUEST_' + name] for name in ('MAX_RETRIES', 'TIMEOUT')])"
    )
    ours = {"MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "PYTEST_CURRENT_TEST", "CI"}
    env = {k: v for k, v in os.environ.items() if k not in ours} | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("None ['1', '7']")
