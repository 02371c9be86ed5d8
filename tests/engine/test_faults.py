"""A run that is killed again and again is, bit for bit, the run that was not."""

import psutil
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from tests.engine.faults import MOMENTS, run_under_fire
from tests.engine.running import TWINS, journal, losses, short

EVERY = "lvdm-short-sky-tiny"
"""The twin that is killed at every kind of moment here; `make soak` does that to all."""
THREE = ("start-up", "save", "validation")
OFTEN = "--checkpoint.every 3 --checkpoint.keep 2 --validation.every 4 --validation.sample-every 5 --loop.log-every 1"


def undisturbed_and_under_fire(name, sky, store, folder, moments, seed, workers=0, steps=11, patience=200.0):
    often = f"{OFTEN} --max-steps {steps}"
    run_under_fire(short(name, sky, often), folder / "calm", store, [], seed, patience=patience)
    fire = short(name, sky, f"{often} --num-workers {workers}")
    kills = run_under_fire(fire, folder / "fire", store, moments, seed, patience=patience)
    return folder / "calm", folder / "fire", kills


def assert_the_same(calm, fire, store, steps=11):
    assert losses(fire) == losses(calm) and losses(calm).keys() == set(range(1, steps + 1))
    for line in journal(fire):  # those that were computed twice, too
        if "loss" in line:
            assert line["loss"] == losses(calm)[line["step"]]
    mine, theirs = ({p.name: load_file(p) for p in out.glob("export/*/*.safetensors")} for out in (fire, calm))
    assert mine.keys() == theirs.keys() and len(mine) > 0
    for name in mine:
        assert all((mine[name][key] == theirs[name][key]).all() for key in mine[name])
    validated = [
        {line["step"]: line["val/loss"] for line in journal(out) if "val/loss" in line} for out in (fire, calm)
    ]
    assert validated[0] == validated[1] and validated[0].keys() == {*range(4, steps, 4), steps}
    client = MlflowClient(tracking_uri=store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize("name", TWINS)
def test_a_run_killed_at_any_moment_has_the_losses_and_weights_of_an_undisturbed_one(name, sky, store, tmp_path):
    moments, steps = (MOMENTS, 14) if name == EVERY else (THREE, 11)
    calm, fire, kills = undisturbed_and_under_fire(name, sky, store, tmp_path, list(moments), seed=1, steps=steps)
    assert set(kills.moments) >= {*moments} - {"anywhere"}
    assert_the_same(calm, fire, store, steps)


def test_the_same_with_data_read_by_workers(sky, store, tmp_path):
    calm, fire, kills = undisturbed_and_under_fire(
        "lvdm-video-vae-tiny", sky, store, tmp_path, ["step", "save"], seed=2, workers=2
    )
    assert kills.moments == ["step", "save"] and len(kills.families) >= 2 * 2
    assert psutil.wait_procs(map(psutil.Process, filter(psutil.pid_exists, kills.families)), timeout=30)[1] == []
    assert_the_same(calm, fire, store)
