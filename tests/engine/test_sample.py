"""`sample` and `measure-latents` on a real run."""

import json
import os
import shutil
import time

import av
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

import core.sample_log
from core.errors import UserError
from core.journal import Journal
from core.run_facts import run_facts, write_facts
from core.slots import DDIM, DDPM, LMS, PNDM, DPMSolverMultistep, Euler, EulerAncestral, FlowMatchEuler, Heun, UniPC
from core.sources import find_source
from core.validate import real_clips
from core.verbs.measure import measure_latents
from core.verbs.sample import sample as sample_from
from core.verbs.sync import sync
from registry import get, main, names
from tests.engine.running import registry, run_here, short
from tests.tracking.servers import deaf

SMALL = {"frames": 4, "height": 32, "width": 32, "formats": ("png",)}
"""Clips that cost little, where it is not their contents that matter."""


def sample(where, **given):
    """On the CPU, in two steps."""
    return sample_from(where, **({"device": "cpu", "log": False, "steps": 2, "num": 1} | given))


@pytest.fixture(scope="module")
def run(sky, _migrated_store, tmp_path_factory):
    """A run of the sky twin long enough that its average is not its raw weights."""
    folder = tmp_path_factory.mktemp("sampled")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    return run_here(short("lvdm-short-sky-tiny", sky, "--lr 1e-2"), folder / "run", store), store


def video(path):
    """Frames and frames a second of an mp4."""
    with av.open(str(path)) as container:
        fps = container.streams.video[0].average_rate
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), fps


def strip(folder, n=0):
    """The frames of a clip beside each other, lossless."""
    return np.asarray(Image.open(folder / f"clip-{n:03d}.png")).astype(int)


def told(folder):
    return json.loads((folder / "samples.json").read_text())


def test_the_same_seed_gives_the_same_clip_whatever_else_is_sampled(run, tmp_path):
    out = str(run[0].output_dir)
    many = sample(out, num=3, seed=5, batch_size=2, output_dir=tmp_path / "many")
    one = sample(f"run:{run[0].run_id}", seed=5, batch_size=1, output_dir=tmp_path / "one", store=run[1])
    other = sample(out, seed=6, output_dir=tmp_path / "other")
    assert np.abs(strip(many) - strip(one)).max() <= 1
    assert np.abs(strip(one) - strip(other)).mean() > 4
    assert np.abs(strip(many) - strip(many, 1)).mean() > 4
    files = {f"clip-00{n}.{kind}" for n in range(3) for kind in ("mp4", "gif", "png")}
    assert {p.name for p in many.iterdir()} == files | {"grid.gif", "grid.mp4", "sheet.png", "samples.json"}


def test_raw_weights_are_others_than_the_average(run, tmp_path):
    out = str(run[0].output_dir)
    averaged, raw = sample(out, output_dir=tmp_path / "a"), sample(out, output_dir=tmp_path / "r", raw=True)
    assert not np.array_equal(strip(averaged), strip(raw))
    assert (told(averaged)["averaged"], told(raw)["averaged"]) == (True, False)


def test_run_checkpoint_and_export_give_the_same_clip_wherever_the_export_is(run, tmp_path):
    out = run[0].output_dir
    shutil.copytree(out / "export", tmp_path / "elsewhere")
    sources = (out, out / "checkpoints" / "step-00000006", out / "export", tmp_path / "elsewhere")
    made = [sample(str(where), output_dir=tmp_path / str(n)) for n, where in enumerate(sources)]
    for other in made[1:]:
        assert np.abs(strip(made[0]) - strip(other)).max() <= 1
    assert told(made[0])["weights_hash"] == told(made[1])["weights_hash"] != told(made[2])["weights_hash"]
    assert told(made[2])["weights_hash"] == told(made[3])["weights_hash"]
    assert told(made[3])["run"] is None
    with pytest.raises(UserError, match="--raw: export holds one set of weights"):
        sample(str(out / "export"), raw=True)


def test_an_export_without_a_recipe_takes_one_that_was_trained_on_the_same_noise(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run[0].output_dir / "export", bare)
    (bare / "recipe.json").unlink()
    with pytest.raises(UserError, match="say which recipe they are of, --recipe NAME"):
        find_source(str(bare), get, names())
    with pytest.raises(UserError, match="prediction_type is 'v_prediction', but 'epsilon' in lvdm-short-sky"):
        find_source(str(bare), get, names(), recipe="lvdm-short-sky")
    named = sample(find_source(str(bare), get, names(), recipe="lvdm-short-sky-tiny"), output_dir=tmp_path / "a")
    assert np.abs(strip(named) - strip(sample(str(run[0].output_dir), output_dir=tmp_path / "b"))).max() <= 1


def test_a_recipe_by_name_takes_weights_or_says_that_its_samples_are_noise(run, tmp_path, capsys):
    export = str(run[0].output_dir / "export")
    weighed = sample(find_source("lvdm-short-sky-tiny", get, names(), weights=export), output_dir=tmp_path / "w")
    assert "noise; give --weights" not in capsys.readouterr().err
    assert np.abs(strip(weighed) - strip(sample(export, output_dir=tmp_path / "e"))).max() <= 1
    fresh = sample(find_source("lvdm-short-sky-tiny --seed 3", get, names()), output_dir=tmp_path / "f")
    assert "note: lvdm-short-sky-tiny has fresh weights, so these samples are noise" in capsys.readouterr().err
    assert told(fresh)["weights_hash"] is None and told(fresh)["recipe_delta"] == ["--seed", "3"]
    with pytest.raises(UserError, match="has weights of its own"):
        find_source(str(run[0].output_dir), get, names(), weights=export)


def test_size_length_and_rate_are_free_within_what_the_networks_can_do(run, tmp_path, capsys):
    out = str(run[0].output_dir)
    made = sample(out, frames=24, height=96, fps=5, output_dir=tmp_path / "long")
    clip, fps = video(made / "clip-000.mp4")
    assert clip.shape == (24, 96 * 4, 64 * 4, 3) and fps == 5
    said = capsys.readouterr().err
    assert "note: 24 frames, trained on 16" in said and "note: 96 x 64 pixels, trained on 64 x 64" in said
    for flag, value, nearest in (("frames", 19, 20), ("height", 70, 64), ("width", 1, 32)):
        with pytest.raises(UserError, match=f"--{flag} {value}: .* the nearest that fits is {nearest}$"):
            sample(out, **{flag: value}, output_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_json_says_all_that_made_the_clips(run, tmp_path):
    made = told(sample(str(run[0].output_dir), seed=9, sampler=Heun(), steps=3, num=2, output_dir=tmp_path / "s"))
    assert made["sampler"] == {
        "is": "Heun", "num_inference_steps": 3, "guidance_scale": 1.0, "negative_prompt": "", "karras_sigmas": True,
        "free_init": None, "free_noise": None,
    }  # fmt: skip
    assert (made["recipe"], made["seed"]) == ("lvdm-short-sky-tiny", 9)
    assert get(made["recipe"], *made["recipe_delta"]).optim.lr == 1e-2
    assert made["checkpoint"].endswith("step-00000006") and len(made["weights_hash"]) == 64
    assert made["versions"]["diffusers"]
    assert [(clip["number"], clip["prompt"], clip["files"][2]) for clip in made["clips"]] == [
        (0, "", "clip-000.png"), (1, "", "clip-001.png"),
    ]  # fmt: skip


def test_samples_never_mix_with_others(run, tmp_path):
    out = str(run[0].output_dir)
    first, second = sample(out, seed=77, **SMALL), sample(out, seed=77, **SMALL)
    assert first.parent == second.parent == run[0].output_dir / "samples"
    assert (first.name, second.name) == ("step-00000006-seed-77", "step-00000006-seed-77-2")
    assert {p.suffix for p in first.iterdir()} == {".png", ".json"}
    with pytest.raises(UserError, match="holds these samples already: name another folder"):
        sample(out, output_dir=first, seed=77, **SMALL)
    with pytest.raises(UserError, match="holds samples that differ in seed, clips: name another folder"):
        sample(out, output_dir=first, num=2, **SMALL)
    (first / "samples.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds a samples.json that is none of ours"):
        sample(out, output_dir=first, seed=77, **SMALL)


def test_a_call_that_was_killed_goes_on_where_it_was(run, tmp_path, capsys):
    """The clips of the grid are made again: it shows their pixels, which a lossy file does not hold."""
    given = SMALL | {"num": 19, "batch_size": 4, "output_dir": tmp_path / "s"}
    whole = sample(str(run[0].output_dir), **given)
    sheet, before = (whole / "sheet.png").read_bytes(), [strip(whole, n) for n in range(19)]
    killed = told(whole) | {"complete": False}
    (whole / "samples.json").write_text(json.dumps(killed))
    for n in (2, 17):
        (whole / f"clip-{n:03d}.png").unlink()
    (whole / "sheet.png").unlink()
    (whole / ".partial-clip-017.png").write_bytes(b"torn")
    os.utime(whole / "clip-018.png", (1, 1))
    sample(str(run[0].output_dir), **given)
    assert "goes on in" in capsys.readouterr().err
    assert told(whole)["complete"] and len(told(whole)["clips"]) == 19
    assert (whole / "clip-018.png").stat().st_mtime == 1
    assert all(np.abs(strip(whole, n) - before[n]).max() <= 1 for n in range(19))
    assert {p.name for p in whole.iterdir()} == {f"clip-{n:03d}.png" for n in range(19)} | {"sheet.png", "samples.json"}
    assert abs(len((whole / "sheet.png").read_bytes()) - len(sheet)) < 1000


def logged(client, run_id, name):
    """What MLflow has of a folder of samples."""
    return {f.path.removeprefix(f"samples/{name}/") for f in client.list_artifacts(run_id, f"samples/{name}")}


def test_samples_are_logged_to_their_run_unless_told_not_to(run, tmp_path, capsys):
    result, store = run
    client, out = MlflowClient(tracking_uri=store), str(result.output_dir)
    within = sample(out, log=True, seed=31, **SMALL)
    assert logged(client, result.run_id, within.name) == {"sheet.png", "clip-000.png", "samples.json"}
    sample(out, log=True, output_dir=tmp_path / "elsewhere", **SMALL)
    assert logged(client, result.run_id, "elsewhere") == {"sheet.png", "clip-000.png", "samples.json"}
    sample(out, output_dir=tmp_path / "unlogged", **SMALL)
    assert not logged(client, result.run_id, "unlogged")
    assert client.get_run(result.run_id).info.status == "FINISHED"
    assert told(within)["run_id"] == result.run_id
    assert "MLflow" not in capsys.readouterr().err


def test_samples_of_a_run_that_is_being_trained_leave_its_journal_to_it(run, capsys):
    result, store = run
    journal = Journal(result.output_dir / "journal.jsonl")
    size = journal.path.stat().st_size
    made = sample(str(result.output_dir), log=True, seed=32, **SMALL)
    journal.close()
    assert journal.path.stat().st_size == size
    assert logged(MlflowClient(tracking_uri=store), result.run_id, made.name) >= {"clip-000.png"}


@pytest.fixture
def deafened(run, tmp_path, monkeypatch):
    """A copy of the run whose MLflow server takes connections and says nothing."""
    monkeypatch.setattr(core.sample_log, "WAIT", 0.5)
    copied = shutil.copytree(run[0].output_dir, tmp_path / "copied")
    with deaf() as uri:
        write_facts(copied, run_facts(copied) | {"store": uri})
        yield copied


def test_a_deaf_server_keeps_nobody_waiting_and_sync_brings_the_samples_when_it_hears(run, deafened, capsys):
    began = time.monotonic()
    made = sample(str(deafened), log=True, seed=33, **SMALL)
    assert time.monotonic() - began < 60
    said = capsys.readouterr().err
    assert "MLflow did not take them" in said and f"later: python -m registry sync {deafened}" in said
    assert told(made)["complete"]
    assert sync(str(deafened), run[1]) == 0
    client = MlflowClient(tracking_uri=run[1])
    assert logged(client, run[0].run_id, made.name) == {"sheet.png", "clip-000.png", "samples.json"}


def test_a_folder_elsewhere_that_mlflow_did_not_take_is_sent_by_mlflow_s_own_command(deafened, tmp_path, capsys):
    made = sample(str(deafened), log=True, output_dir=tmp_path / "far", **SMALL)
    said = capsys.readouterr().err
    assert f"mlflow artifacts log-artifacts --run-id {run_facts(deafened)['run_id']} --local-dir {made}" in said


def test_a_checkpoint_that_is_damaged_is_named_and_an_older_one_taken(run, tmp_path, capsys):
    copied = shutil.copytree(run[0].output_dir, tmp_path / "copied")
    newer = shutil.copytree(copied / "checkpoints" / "step-00000006", copied / "checkpoints" / "step-00000007")
    weights = next(newer.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    made = sample(str(copied), output_dir=tmp_path / "s", **SMALL)
    assert "note: damaged, so an older one is taken: " in capsys.readouterr().err
    assert told(made)["checkpoint"].endswith("step-00000006") and "step-00000007" in told(made)["notes"][0]
    with pytest.raises(UserError, match=f"checkpoint {newer}: .*; take another one of the run"):
        sample(str(newer))
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    with pytest.raises(UserError, match=r"has no whole checkpoint: .*step-00000007"):
        sample(str(copied))


FIT = (DDIM(eta=1.0), DDPM(), PNDM(), LMS(), Euler(), EulerAncestral(), Heun(), DPMSolverMultistep(), UniPC())


@pytest.mark.parametrize("sampler", FIT, ids=lambda sampler: type(sampler).__name__)
def test_every_sampler_makes_the_same_clip_alone_and_among_others(run, tmp_path, sampler):
    given = SMALL | {"sampler": sampler, "steps": 4, "seed": 8}
    many = sample(str(run[0].output_dir), **given, num=3, batch_size=3, output_dir=tmp_path / "3")
    alone = sample(str(run[0].output_dir), **given, num=3, batch_size=1, output_dir=tmp_path / "1")
    assert told(many)["sampler"]["is"] == type(sampler).__name__
    for n in range(3):
        assert np.abs(strip(many, n) - strip(alone, n)).max() <= 1
    assert np.abs(strip(many, 1) - strip(many, 2)).mean() > 4


def test_two_processes_make_each_clip_once_and_the_clips_of_one(run, tmp_path):
    words = ["sample", str(run[0].output_dir), "--num", "3", "--steps", "2", "--no-log", "--device", "cpu"]
    done = registry(*words, "--nproc", "2", "--output-dir", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["two"]
    one, two = sample(str(run[0].output_dir), num=3, output_dir=tmp_path / "one"), tmp_path / "two"
    assert [clip["number"] for clip in told(two)["clips"]] == [0, 1, 2]
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for n in range(3):
        assert np.abs(strip(one, n) - strip(two, n)).max() <= 1
    sheets = [np.asarray(Image.open(folder / "sheet.png")).astype(int) for folder in (one, two)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"sampler": Heun(), "eta": 0.5}, "Heun has no eta; take --sampler=DDIM"),
        ({"guidance_scale": 3.0}, "is told no text"),
        ({"prompt": ["a"]}, "--prompt: lvdm-short-sky-tiny is told no text"),
        ({"interactive": True}, "--interactive: lvdm-short-sky-tiny is told no text"),
        ({"steps": 1000}, "--sampler=DDIM: DDIM takes at most 999 steps over 1000 timesteps"),
        ({"sampler": FlowMatchEuler()}, "FlowMatchEuler needs a network that predicts flow, not v_prediction"),
        ({"sampler": Heun(), "steps": 1}, "Heun.num_inference_steps = 1: must be at least 2"),
        ({"num": 0}, "num = 0: must be at least 1"),
        ({"eta": 2.0}, "DDIM.eta = 2.0: must be in"),
    ],
)
def test_what_would_have_no_effect_or_cannot_be_is_refused(run, given, why):
    with pytest.raises(UserError, match=why):
        sample(str(run[0].output_dir), **given)


def test_a_folder_that_is_none_of_the_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run, checkpoint or export"):
        find_source(str(tmp_path), get, names())
    with pytest.raises(UserError, match="'nothing' is no directory, no recipe and no run here"):
        find_source("nothing", get, names(), store=f"sqlite:///{tmp_path}/mlflow.db")


def test_a_sampler_on_the_command_line_keeps_the_recipe_s_steps(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(run[0].output_dir), "--sampler=UniPC", "--sampler.solver-order", "1", "--no-log"]
    assert main([*words, "--num", "1", "--formats", "png", "--device", "cpu", "--output-dir", "u"]) == 0
    assert capsys.readouterr().out == "u\n"
    sampler = told(tmp_path / "u")["sampler"]
    assert (sampler["is"], sampler["solver_order"], sampler["num_inference_steps"]) == ("UniPC", 1, 2)
    assert isinstance(short("lvdm-short-sky-tiny", tmp_path).validation.sampler, DDIM)


def test_what_is_wrong_is_said_once_and_not_by_each_process(run, capfd):
    words = ["sample", str(run[0].output_dir), "--nproc", "2", "--device", "cpu"]
    for more, why in ((["--interactive"], "is told no text"), (["--sampler=FlowMatchEuler"], "predicts flow")):
        assert main([*words, *more]) == 2
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 1 and why in said[0]


def test_an_autoencoder_makes_no_samples_and_says_so(sky, store, tmp_path):
    out = run_here(short("lvdm-video-vae-tiny", sky, "--max-steps 1"), tmp_path / "vae", store).output_dir
    with pytest.raises(UserError, match="no generative recipe"):
        sample(str(out))


def test_measured_constants_give_latents_of_mean_zero_and_deviation_one(sky, store, tmp_path):
    out = run_here(short("lvdm-video-vae-tiny", sky, "--max-steps 3"), tmp_path / "vae", store).output_dir
    recipe = short("lvdm-short-sky-tiny", sky)
    constants = measure_latents(recipe, clips=6, weights=str(out), device="cpu", write=True)
    stored = json.loads((out / "export" / "vae" / "config.json").read_text())
    assert {k: stored[k] for k in constants} == constants
    vae = recipe.system.autoencoder.build()
    from core.weights.load import load_component

    load_component(vae, str(out), "vae")
    mean = vae.encode(real_clips(recipe.data.build(), 6)).mean
    latents = constants["scale_factor"] * (mean + constants["shift_factor"])
    # the noise of the posterior is part of what was measured: the means alone vary less
    assert abs(latents.mean()) < 0.1 and 0.05 < latents.std() <= 1.05
