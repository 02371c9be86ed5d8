"""Whole runs over what others wrote: a checkpoint that lies with a manifest that fits, files beside it, odd names."""

import json
import os
import pickle
import shutil

import pytest
import torch

from core import manifest
from core.errors import UserError
from core.slots import Launch
from core.train import Result, train
from tests.engine.running import losses, run_here, short
from tests.fuzz.hostile import outcome, untouched
from tests.fuzz.test_weights import Command

NAME = "lvdm-video-vae-tiny"
LITTLE = "--global-batch 2 --batch-size 1 --validation.num-samples 0 --validation.num-batches 1"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two wait for each other on a busy machine, and these runs are about files."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(_one_thread, sky, _migrated_store, tmp_path_factory):
    """A run of two updates with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(_migrated_store, folder / "mlflow.db")
    recipe = short(NAME, sky, f"{LITTLE} --max-steps 2 --checkpoint.every 1 --checkpoint.keep 9")
    return recipe, run_here(recipe, folder / "run", f"sqlite:///{folder}/mlflow.db").output_dir


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, and the recipe that goes on."""
    out = tmp_path / "out" / "run"
    shutil.copytree(whole[1], out)
    (out / "run.json").unlink()
    return whole[0].but(loop=whole[0].loop.but(max_steps=3)), out


def go_on(recipe, out, store):
    """Resume, and see that nothing but the output directory and the store was written."""
    (out.parents[1] / "beside").mkdir()
    beside = [out.parents[1] / "beside", *(p for p in out.parent.iterdir() if p != out)]
    with untouched(*beside):
        found = outcome(lambda: train(recipe, Launch(resume=str(out), store=store, device="cpu")))
    assert [p.name for p in out.parent.iterdir()] == ["run"]
    return found


def with_numbers(out, **changes):
    """The newest checkpoint with other numbers, and a manifest that fits them."""
    folder = out / "checkpoints" / "step-00000002"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))
    manifest.write(folder, manifest.digests(folder))


@pytest.mark.parametrize("changes", [{"threads": 10**9}, {"window": {}}, {"scaler": [0.0, 0]}], ids=str)
def test_numbers_that_no_run_writes_are_refused_in_a_line(copy, store, changes):
    with_numbers(copy[1], **changes)
    found = go_on(*copy, store)
    assert isinstance(found, UserError) and next(iter(changes)) in str(found)


@pytest.mark.parametrize("changes", [{"drawn": 10**9, "epoch": 2**52}, {"optimizer_steps": {"a": 1.0}}], ids=str)
def test_numbers_that_could_be_are_gone_on_with_or_refused_in_a_line(copy, store, changes):
    with_numbers(copy[1], **changes)
    found = go_on(*copy, store)
    assert isinstance(found, UserError | Result), found


def test_a_step_beyond_the_end_ends_the_run_at_once(copy, store):
    with_numbers(copy[1], step=2**50)
    found = go_on(*copy, store)
    assert isinstance(found, UserError) or found.step == 2**50


def test_what_lies_beside_a_checkpoint_is_neither_run_nor_followed(copy, store, tmp_path):
    recipe, out = copy
    trap = pickle.dumps(Command(tmp_path / "proof"))
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "rng_state.pth"):
        (out / "checkpoints" / "step-00000002" / name).write_bytes(trap)
    (out / "checkpoints" / "step-00000009").symlink_to(tmp_path / "nowhere")
    (out / "checkpoints" / "step-99999999999999999999").mkdir()
    (out / "checkpoints" / "step-0000000x").write_bytes(b"")
    found = go_on(recipe, out, store)
    assert isinstance(found, Result) and found.step == 3 and not (tmp_path / "proof").exists()


@pytest.mark.parametrize("content", ['{"run_id": 3}', '{"run_id": "gone"}'])
def test_a_damaged_run_json_costs_the_link_to_mlflow_at_most(copy, store, content):
    (copy[1] / "run.json").write_text(content)
    found = go_on(*copy, store)
    assert isinstance(found, UserError) or found.step == 3


def test_samples_with_names_that_a_terminal_would_obey_are_named_without_harm(sky, store, tmp_path, capsys):
    shutil.copytree(sky, tmp_path / "sky")
    video = next((tmp_path / "sky" / "train").iterdir())
    clip = next(video.iterdir())
    for frame in clip.iterdir():
        frame.write_bytes(b"")
    clip.rename(os.fsdecode(os.fsencode(clip.parent) + b"/\xff\x1b[2J\nforged line"))
    recipe = short(NAME, tmp_path / "sky", f"{LITTLE} --max-steps 6 --data.max-bad-share 0.9")
    out = run_here(recipe, tmp_path / "run", store).output_dir
    log = (out / "run.log").read_text()
    assert r"/\udcff\x1b[2J\nforged line/" in log and "\x1b" not in capsys.readouterr().err
    assert losses(out).keys() == set(range(1, 7))
