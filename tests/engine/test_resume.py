"""Where a run starts: `--resume auto`, `--init-from`, `--allow`, damaged checkpoints, longer runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.errors import UserError
from core.slots import Launch
from core.train import train
from tests.engine.running import journal, losses, run_here, short

NAME = "lvdm-video-vae-tiny"
FLAT = "--optim.schedule.name constant --optim.schedule.warmup-steps 0 --checkpoint.every 2 --checkpoint.keep 9"


@pytest.fixture(scope="module")
def six(sky, _migrated_store, tmp_path_factory):
    """A run of six updates with all its checkpoints."""
    folder = tmp_path_factory.mktemp("six")
    shutil.copy(_migrated_store, folder / "mlflow.db")
    return run_here(short(NAME, sky, FLAT), folder / "run", f"sqlite:///{folder}/mlflow.db").output_dir


@pytest.fixture
def copy(six, tmp_path):
    """A copy of that run, as if it stood on another machine."""
    shutil.copytree(six, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    return tmp_path / "run"


def log(out):
    return (out / "run.log").read_text()


def test_auto_starts_afresh_goes_on_and_finds_nothing_to_do_by_the_same_line(sky, store, tmp_path):
    recipe = short(NAME, sky, f"{FLAT} --max-steps 2")
    first = run_here(recipe, tmp_path / "run", store, resume="auto")
    longer = run_here(short(NAME, sky, f"{FLAT} --max-steps 4"), tmp_path / "run", store, resume="auto")
    again = run_here(short(NAME, sky, f"{FLAT} --max-steps 4"), tmp_path / "run", store, resume="auto")
    assert (first.step, longer.step, again.step) == (2, 4, 4) and first.run_id == longer.run_id == again.run_id
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4}
    assert "from step 0 of 2" in log(tmp_path / "run") and "resumed at step 2 of 4" in log(tmp_path / "run")


def test_a_longer_run_is_the_run_that_was_long_from_the_start(copy, sky, store, tmp_path):
    longer = train(short(NAME, sky, f"{FLAT} --max-steps 9"), Launch(resume=str(copy), store=store, device="cpu"))
    whole = run_here(short(NAME, sky, f"{FLAT} --max-steps 9"), tmp_path / "whole", store)
    assert longer.step == 9 and losses(copy) == losses(whole.output_dir)


def test_a_mean_over_updates_before_and_after_a_resume_is_that_of_the_undisturbed_run(sky, store, tmp_path):
    rare = short(NAME, sky, f"{FLAT} --max-steps 7 --loop.log-every 5 --checkpoint.every 3")
    whole = run_here(rare, tmp_path / "whole", store).output_dir
    shutil.copytree(whole, tmp_path / "cut")
    for path in ("run.json", "journal.jsonl"):
        (tmp_path / "cut" / path).unlink()
    for step in (6, 7):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    train(rare, Launch(resume=str(tmp_path / "cut"), store=store, device="cpu"))
    assert losses(tmp_path / "cut") == losses(whole) and losses(whole).keys() == {5, 7}


def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(copy, sky, store):
    shard = next((copy / "checkpoints" / "step-00000006").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    result = train(short(NAME, sky, FLAT), Launch(resume=str(copy), store=store, device="cpu"))
    assert result.step == 6 and "resumed at step 4 of 6" in log(copy)
    assert f"damaged, set aside: {shard.parent}: {shard.name} has" in log(copy)
    kept = [p.name for p in (copy / "checkpoints").iterdir()]
    assert "step-00000006" in kept and any(name.startswith("damaged-step-00000006") for name in kept)


def test_when_every_checkpoint_is_damaged_resume_says_so_and_auto_starts_at_step_0(copy, sky, store):
    for path in (copy / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole: .*step-00000006: state.json has 2 bytes"):
        train(short(NAME, sky, FLAT), Launch(resume=str(copy), store=store, device="cpu"))
    result = run_here(short(NAME, sky, FLAT), copy, store, resume="auto")
    assert result.step == 6 and "has no whole checkpoint: starts at step 0" in log(copy)


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0_in_the_same_directory(copy, sky, store):
    before = losses(copy)
    shutil.rmtree(copy / "checkpoints")
    result = train(short(NAME, sky, FLAT), Launch(resume=str(copy), store=store, device="cpu"))
    assert result.step == 6 and losses(copy) == before
    assert all(line["loss"] == before[line["step"]] for line in journal(copy) if "loss" in line)


def test_another_recipe_is_shown_field_by_field_and_goes_on_only_where_that_is_allowed(copy, sky, store):
    other = short(NAME, sky, f"{FLAT} --lr 1e-3 --seed 5 --max-steps 8")
    with pytest.raises(UserError, match=r"loop.seed: 23 there, 5 here; optim.lr: 0.002 there, 0.001 here.*--allow"):
        train(other, Launch(resume=str(copy), store=store, device="cpu"))
    with pytest.raises(UserError, match=r"--allow optim.rate: the recipe has no such field or slot"):
        train(other, Launch(resume=str(copy), store=store, device="cpu", allow=("optim.rate",)))
    allowed = Launch(resume=str(copy), store=store, device="cpu", allow=("optim.lr", "loop.seed"))
    assert train(other, allowed).step == 8
    assert [line["lr"] for line in journal(copy) if line.get("step") == 8 and "lr" in line] == [1e-3]
    assert json.loads((copy / "recipe.json").read_text())["fields"]["optim"]["lr"] == 1e-3


def test_with_init_from_auto_takes_weights_first_and_the_full_state_afterwards(six, sky, store, tmp_path):
    still = short(NAME, sky, f"{FLAT} --lr 1e-20 --max-steps 1")
    out = run_here(still, tmp_path / "run", store, resume="auto", init_from=str(six)).output_dir
    source = load_file(next((six / "export").glob("*/*.safetensors")))
    began = load_file(next(out.glob("checkpoints/*/*.safetensors")))
    component = next((six / "export").iterdir()).name
    for name, tensor in source.items():
        np.testing.assert_allclose(began[f"weights.{component}.{name}"], tensor, atol=1e-12)
    run_here(still.but(loop=still.loop.but(max_steps=2)), out, store, resume="auto", init_from=str(six))
    assert f"--init-from {six} was for the first launch" in log(out) and "resumed at step 1 of 2" in log(out)


def test_auto_needs_to_know_the_directory(sky, store):
    with pytest.raises(UserError, match="--resume auto goes on in a directory that it has to know: give --output-dir"):
        train(short(NAME, sky), Launch(resume="auto", store=store))


def test_a_checkpoint_folder_is_no_run_and_the_run_is_named(six, sky, store):
    with pytest.raises(UserError, match=f"is a checkpoint; name the output directory of its run, {six}"):
        train(short(NAME, sky, FLAT), Launch(resume=str(six / "checkpoints" / "step-00000004"), store=store))


def test_the_number_of_threads_goes_on_too(copy, sky, store):
    threads = torch.get_num_threads()
    state = json.loads((copy / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["threads"] == threads
    try:
        torch.set_num_threads(3 - threads)
        train(short(NAME, sky, f"{FLAT} --max-steps 7"), Launch(resume=str(copy), store=store, device="cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
