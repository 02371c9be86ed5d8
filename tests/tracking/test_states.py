"""The state in MLflow is true: finished, failed, killed, or dead and found by the doctor."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient

import registry
from core import provenance
from core.journal import read
from core.liveness import judge, silence
from core.replica import Replica
from core.run_facts import run_facts
from core.verbs.doctor import running
from tests.engine.running import run_here, short
from tests.tracking.running import content, opened, points

ROOT = Path(__file__).parents[2]
VICTIM = """
import sys, time
from pathlib import Path
from tests.tracking.running import everything, opened
tracker = opened(Path(sys.argv[1]), sys.argv[2])
everything(tracker)
print(tracker.run_id, flush=True)
for step in range(4, 10**9):
    tracker.metrics({"loss": 1.0 / step}, step)
    print(step, flush=True)
    time.sleep(0.002)
"""


@pytest.fixture
def victim(tmp_path, store):
    """A run whose process was killed with -9 in its steps: output directory, run id, the last step it said."""
    out = tmp_path / "run"
    words = [sys.executable, "-c", VICTIM, str(out), store]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        run_id = process.stdout.readline().strip()
        for line in process.stdout:
            if int(line) == 400:
                process.kill()
    return out, run_id, int(line)


def test_after_kill_9_the_doctor_closes_the_run_at_its_last_sign_with_every_point(
    victim, store, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out, run_id, last = victim
    client = MlflowClient(tracking_uri=store)
    assert client.get_run(run_id).info.status == "RUNNING"
    before = len(client.get_metric_history(run_id, "loss"))
    assert registry.main(["doctor", "--store", store]) == 1
    said = capsys.readouterr().out
    assert re.search(rf"dead +of-a-test \({run_id}\): process \d+ is gone", said) and "doctor --fix" in said
    assert client.get_run(run_id).info.status == "RUNNING"
    assert registry.main(["doctor", "--store", store, "--fix"]) == 0
    run = client.get_run(run_id)
    assert run.info.status == "KILLED" and "is gone" in run.data.tags["closed.why"]
    history = [step for step, *_ in points(client, run_id, "loss")]
    assert history == list(range(1, len(history) + 1)) and history[-1] >= last
    end = max(e["time"] for e, _ in read(out / "journal.jsonl") if e["event"] == "metrics")
    assert run.info.end_time == end  # not the hour at which the doctor came
    capsys.readouterr()
    assert registry.main(["doctor", "--store", store]) == 0 and "0 runs say RUNNING" in capsys.readouterr().out
    print(
        f"kill -9 at step {last}: {before} points were in MLflow, {len(history)} after doctor --fix, lost {last - history[-1]}"
    )


def test_a_run_killed_with_9_goes_on_in_the_same_run_without_a_double_point(victim, store):
    out, run_id, last = victim
    again = opened(out, store)
    for step in range(300, last + 10):  # from an older checkpoint
        again.metrics({"loss": 1.0 / step}, step)
    again.close("FINISHED")
    steps = [step for step, *_ in points(MlflowClient(tracking_uri=store), run_id, "loss")]
    assert again.run_id == run_id and steps == sorted(set(steps)) and steps[-1] == last + 9
    assert steps == list(range(1, last + 10))
    assert content(store, run_id)["status"] == "FINISHED"


def test_a_run_is_born_with_its_process_and_a_sign_of_life_so_that_no_doctor_takes_it_for_dead(tmp_path, store):
    opened(tmp_path / "run", store).close("FINISHED")
    kinds = [event["event"] for event, _ in read(tmp_path / "run" / "journal.jsonl")]
    assert kinds.index("tags") < kinds.index("state")  # RUNNING under the process of before reads as dead
    other = f"sqlite:///{tmp_path}/other.db"
    replica = Replica(tmp_path / "run", other)
    replica.connect()  # and nothing of the journal sent there yet
    tags = MlflowClient(tracking_uri=other).get_run(replica.run_id).data.tags
    assert judge(tags, stale=900) == ("alive", f"process {os.getpid()} runs") and silence(tags) < 60


def test_the_doctor_leaves_alone_what_lives_and_what_is_not_ours(tmp_path, store, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(tracking_uri=store)
    foreign = client.create_run("0", run_name="someone else's").info.run_id
    tracker = opened(tmp_path / "runs" / "run", store)
    try:
        assert registry.main(["doctor", "--store", store, "--fix", "--suspected"]) == 0
        said = capsys.readouterr().out
        assert f"alive     of-a-test ({tracker.run_id}): process {os.getpid()} runs" in said and foreign not in said
        assert client.get_run(foreign).info.status == client.get_run(tracker.run_id).info.status == "RUNNING"
        assert registry.main(["sync", str(tmp_path / "runs" / "run")]) == 0
        assert "is being trained; its own process sends" in capsys.readouterr().out
    finally:
        tracker.close("FINISHED")


def test_the_doctor_closes_a_run_whose_files_are_elsewhere_only_when_told(tmp_path, store, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(tracking_uri=store)
    long_ago = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
    tags = {"uid": "far", "host": "elsewhere", "heartbeat": long_ago, "output_dir": "/no/such/folder"}
    run_id = client.create_run("0", tags=tags, run_name="far").info.run_id
    assert registry.main(["doctor", "--store", store, "--fix"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"suspected +far \(.*\): silent for 3 h, on elsewhere", said) and "--fix --suspected" in said
    assert client.get_run(run_id).info.status == "RUNNING"
    assert registry.main(["doctor", "--store", store, "--fix", "--suspected"]) == 0
    run = client.get_run(run_id)
    assert run.info.status == "KILLED" and run.info.end_time == int(datetime.fromisoformat(long_ago).timestamp() * 1000)


def test_a_run_that_mlflow_never_saw_is_found_sent_and_closed_by_the_doctor(tmp_path, store, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "run"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
    code = VICTIM.replace("print(step, flush=True)", "break")
    words = [sys.executable, "-c", code + "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", str(out), dead]
    assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert registry.main(["doctor", "--store", store]) == 1
    assert "MLflow lacks" in capsys.readouterr().out
    assert registry.main(["doctor", "--store", store, "--fix"]) == 0
    (run_id,) = re.findall(r"dead +of-a-test \((\w+)\)", capsys.readouterr().out)
    found = content(store, run_id)
    assert found["status"] == "KILLED" and found["models"] and len(found["metrics"]["loss"][0]) == 4


HERE = {
    "host": socket.gethostname(),
    "pid": str(os.getpid()),
    "process.boot": provenance.boot_id(),
    "process.started": provenance.started(os.getpid()),
    "process.namespace": provenance.namespace(),
}


@pytest.mark.parametrize(
    ("change", "silent", "state"),
    [
        ({}, 9999, "alive"),
        ({"process.started": "1"}, 5, "dead"),  # the pid was given to another process
        ({"pid": "999999999"}, 5, "dead"),
        ({"pid": "no number"}, 5, "dead"),
        ({"process.boot": "before"}, 600, "dead"),
        ({"process.boot": "before"}, 5, "alive"),  # another machine of this name
        ({"process.namespace": "pid:[1]", "pid": "999999999"}, 60, "alive"),  # in a container
        ({"process.namespace": "pid:[1]", "pid": "999999999"}, 1800, "suspected"),
        ({"host": "elsewhere"}, 60, "alive"),
        ({"host": "elsewhere"}, 1800, "suspected"),
        ({"host": "elsewhere"}, None, "suspected"),
    ],
)
def test_a_run_is_judged_by_its_process_here_and_by_its_silence_elsewhere(change, silent, state):
    said = {} if silent is None else {"heartbeat": (datetime.now(UTC) - timedelta(seconds=silent)).isoformat()}
    assert judge(HERE | said | change, stale=900).state == state


def test_a_process_that_was_killed_but_not_yet_buried_does_not_run():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert provenance.started(process.pid)
        process.kill()
        deadline = time.monotonic() + 100
        while provenance.started(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert provenance.started(process.pid) == ""  # a zombie, until the end of the block


def test_a_living_run_gives_signs_of_life(tmp_path, store, monkeypatch):
    from core import tracker as module

    monkeypatch.setattr(module, "HEARTBEAT", 0.5)
    monkeypatch.setattr(module, "LINGER", 0.1)
    client = MlflowClient(tracking_uri=store)
    tracker = opened(tmp_path / "run", store)
    seen, deadline = set(), time.monotonic() + 200
    while len(seen) < 3 and time.monotonic() < deadline:
        seen.add(client.get_run(tracker.run_id).data.tags.get("heartbeat"))
        time.sleep(0.1)
    assert len(seen - {None}) >= 2
    assert [p.verdict.state for p in running(client, 900)] == ["alive"]
    tracker.close("FINISHED")


def test_the_machine_is_measured_at_steps_of_its_own_that_a_resumed_run_continues(tmp_path, store, monkeypatch):
    from core import tracker as module

    monkeypatch.setattr(module, "SYNC_EVERY", 0.05)
    monkeypatch.setattr(module, "SYSTEM_EVERY", 0.1)
    for _ in range(2):
        tracker = opened(tmp_path / "run", store)
        begun = len(
            [e for e, _ in read(tracker.journal.path) if "system/cpu_utilization_percentage" in e.get("values", ())]
        )
        deadline = time.monotonic() + 200
        while tracker.journal.latest.get("system/cpu_utilization_percentage", (0, -1))[1] < begun + 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        tracker.close("KILLED")
    history = points(MlflowClient(tracking_uri=store), tracker.run_id, "system/cpu_utilization_percentage")
    assert [step for step, *_ in history] == list(range(len(history))) and len(history) >= 4
    assert {"system/process_memory_usage_megabytes", "system/disk_available_megabytes"} <= tracker.journal.latest.keys()


def test_an_error_in_training_leaves_failed_with_the_traceback_and_an_interrupt_killed(
    sky, store, tmp_path, monkeypatch
):
    from core import report

    def fails(error):
        def step(self, number, failure):
            if number == 2:
                raise error

        return step

    states = {}
    for error in (ZeroDivisionError("of the test"), KeyboardInterrupt()):
        out = tmp_path / type(error).__name__
        monkeypatch.setattr(report.Report, "step", fails(error))
        with pytest.raises(type(error)):
            run_here(short("lvdm-short-sky-tiny", sky), out, store)
        states[type(error).__name__] = content(store, run_facts(out)["run_id"])
    failed, killed = states["ZeroDivisionError"], states["KeyboardInterrupt"]
    assert (failed["status"], killed["status"]) == ("FAILED", "KILLED")
    assert failed["tags"]["error"] == "ZeroDivisionError: of the test"
    assert "traceback.txt" in {path for path, _ in failed["artifacts"]} - {path for path, _ in killed["artifacts"]}
    assert "in step" in (tmp_path / "ZeroDivisionError" / "traceback.txt").read_text()
