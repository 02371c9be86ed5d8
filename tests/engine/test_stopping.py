"""Ctrl-C, SIGTERM, and the files `save` and `stop`."""

import os
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from core.stopping import Wishes
from tests.engine.processes import start
from tests.engine.running import REPO, flags, journal, losses, run_here, short

NAME = "lvdm-video-vae-tiny"
SLOW = "--global-batch 256 --batch-size 1"
"""An update of several seconds."""


def wait_for(condition, patience=100.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience
        time.sleep(0.01)


def running(out):
    return (out / "run.log").exists() and "from step 0" in (out / "run.log").read_text()


def status(store):
    client = MlflowClient(tracking_uri=store)
    return [run.info.status for run in client.search_runs([e.experiment_id for e in client.search_experiments()])]


def test_ctrl_c_at_a_terminal_with_data_workers_saves_leaves_with_130_and_loses_nothing(sky, store, tmp_path):
    words = flags(NAME, sky, "--max-steps 400 --num-workers 2")
    command = [sys.executable, "-m", "registry", "run", *words, "--output-dir", "run", "--store", store]
    variables = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: (tmp_path / "run" / "journal.jsonl").exists() and len(losses(tmp_path / "run")) > 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    said = process.communicate(timeout=60)[1]
    last = max(losses(tmp_path / "run"))
    assert process.returncode == 130 and status(store) == ["KILLED"] and "Traceback" not in said
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()


def test_a_second_ctrl_c_leaves_at_once(sky, store, tmp_path):
    process = start(short(NAME, sky, SLOW), tmp_path / "said", output_dir=tmp_path / "run", store=store)
    wait_for(lambda: running(tmp_path / "run"))
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.7)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130 and "a second Ctrl-C: leaving at once" in (tmp_path / "said").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_doubled_ctrl_c_is_one(sky, store, tmp_path):
    process = start(short(NAME, sky), tmp_path / "said", output_dir=tmp_path / "run", store=store)
    wait_for(lambda: running(tmp_path / "run"))
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
    process.join(60)
    assert process.exitcode == 130 and any((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_what_takes_longer_than_the_grace_time_is_left_as_it_is(sky, store, tmp_path):
    process = start(short(NAME, sky, SLOW), tmp_path / "said", output_dir=tmp_path / "run", store=store, grace=1.0)
    wait_for(lambda: running(tmp_path / "run"))
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143 and "not done within --grace 1 s: leaving at once" in (tmp_path / "said").read_text()


def test_a_signal_in_a_long_validation_does_not_wait_for_its_end(sky, store, tmp_path):
    long = "--validation.every 2 --validation.num-batches 100000 --validation.batch-size 1 --max-steps 50"
    many = short(NAME, sky, long)
    many = many.but(validation=many.validation.but(data=many.data.but(split="train")))
    out = tmp_path / "run"
    process = start(many, tmp_path / "said", output_dir=out, store=store)
    wait_for(lambda: (out / "journal.jsonl").exists() and 2 in losses(out))
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143 and status(store) == ["KILLED"]
    assert any((out / "checkpoints").glob("step-*/manifest.json"))


def test_the_files_save_and_stop_are_obeyed_at_the_next_step_and_taken_away(sky, store, tmp_path):
    out = tmp_path / "run"
    process = start(short(NAME, sky, "--max-steps 2000"), tmp_path / "said", output_dir=out, store=store)
    wait_for(lambda: (out / "journal.jsonl").exists() and len(losses(out)) >= 2)
    (out / "save").touch()
    wait_for(lambda: any((out / "checkpoints").glob("step-*/manifest.json")) and not (out / "save").exists())
    (out / "stop").touch()
    process.join(60)
    assert process.exitcode == 0 and not (out / "stop").exists() and status(store) == ["KILLED"]
    steps = sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*"))
    assert len(steps) == 2 and steps[-1] == max(losses(out)) < 2000
    resumed = run_here(short(NAME, sky, f"--max-steps {steps[-1] + 2}"), out, store, resume="auto")
    assert resumed.step == steps[-1] + 2 and status(store) == ["FINISHED"]
    assert len([line for line in journal(out) if "loss" in line]) == resumed.step


@pytest.mark.parametrize(
    "wishes", [Wishes(), Wishes(signal.SIGTERM), Wishes(signal.SIGINT, save=True), Wishes(stop=True)]
)
def test_wishes_survive_the_sum_over_ranks(wishes):
    assert Wishes.of([3.0 * flag for flag in wishes.flags()]) == wishes
