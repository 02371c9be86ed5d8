"""LDM from launch to a folder that stock diffusers opens: two networks learn, are averaged, exported, sampled, taken up again."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LDMTextToImagePipeline
from PIL import Image
from safetensors.torch import load_file

from core.checkpoint import checkpoints
from core.draw import Draw
from core.errors import UserError
from core.preflight import preflight
from core.requests import wanted
from core.verbs.sample import sample
from core.verbs.weights import export
from core.weights.importer import import_weights
from core.weights.stored import open_stored
from registry import get
from tests.engine.running import awake as awake_export
from tests.engine.running import run_here, short

NAME = "ldm-laion400m-tiny"
PROMPTS = ["a red cloud", "slowly a blue cloud goes up"]
GREAT = "--lr 1e-2 --optim.schedule.name constant --optim.schedule.warmup-steps 0 --optim.ema.decay 0.5 --max-steps 8"
"""What the stock pipeline asks for; the twin has fewer."""
FOLDERS = {"unet", "bert", "vqvae", "tokenizer", "scheduler", "model_index.json", "recipe.json"}


@pytest.fixture(scope="module")
def run(sky, _migrated_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    return run_here(short(NAME, sky, f"{GREAT}"), folder / "run", f"sqlite:///{folder}/mlflow.db").output_dir


@pytest.fixture(scope="module")
def awake(run, tmp_path_factory):
    """The export with a text that shows: after few updates the layers behind cross-attention are still next to zero."""
    return awake_export(shutil.copytree(run / "export", tmp_path_factory.mktemp("awake") / "export"))


def _of_checkpoint(run, kind, part):
    tensors, start = open_stored(checkpoints(run / "checkpoints")[0]).tensors, f"{kind}.{part}."
    return {n.removeprefix(start): e.read() for n, e in tensors.items() if n.startswith(start)}


def _pictures(folder, **options):
    made = sample(str(folder), prompt=PROMPTS, device="cpu", log=False, **options)
    told = json.loads((made / "samples.json").read_text())
    assert [[f.rpartition(".")[2] for f in clip["files"]] for clip in told["clips"]] == [["png"], ["png"]]
    return np.stack([np.asarray(Image.open(made / clip["files"][0])) for clip in told["clips"]]).astype(int)


def test_both_networks_learn_are_averaged_and_exported(run):
    stored = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "bert/model.safetensors"}
    for part, file in stored.items():
        averaged, raw = _of_checkpoint(run, "ema", part), _of_checkpoint(run, "weights", part)
        written = load_file(run / "export" / file)
        assert not [name for name in raw if torch.equal(raw[name], averaged[name])]  # every tensor has moved
        assert all(torch.equal(written.pop(name), tensor) for name, tensor in averaged.items())
        assert {n for n, t in written.items() if not t.any()} == written.keys()  # the head that nothing uses
        assert written.keys() == ({"to_logits.weight", "to_logits.bias"} if part == "text_encoder" else set())
    assert {p.name for p in (run / "export").iterdir()} == FOLDERS


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_stock_pipeline_opens_an_export_and_makes_our_samples_of_the_same_noise(awake, guidance, tmp_path):
    ours = _pictures(awake, output_dir=tmp_path / "ours", seed=5, steps=7, guidance_scale=guidance)
    pipeline = DiffusionPipeline.from_pretrained(awake)
    assert type(pipeline) is LDMTextToImagePipeline
    pipeline.set_progress_bar_config(disable=True)
    requests = wanted(PROMPTS, 1)
    noise = Draw.fixed("sample 5", [r.id for r in requests], [0, 1], 2).noise((4, 1, 8, 8), "initial")[:, :, 0]
    stock = pipeline(PROMPTS, num_inference_steps=7, guidance_scale=guidance, latents=noise, output_type="np").images
    assert np.abs(ours - stock * 255).max() <= 1.0
    assert np.abs(ours[0] - ours[1]).mean() > 2 and ours.std() > 5  # nothing grey would pass
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_guidance_and_the_text_matter_in_these_samples(awake, tmp_path):
    plain, guided = (
        _pictures(awake, output_dir=tmp_path / str(g), seed=5, steps=7, guidance_scale=g) for g in (1.0, 4.0)
    )
    assert np.abs(plain - guided).mean() > 1


def test_the_verb_writes_the_folder_that_the_run_wrote(run, tmp_path):
    export(str(run), to=tmp_path / "exported", raw=False, store=None)
    written = {p.relative_to(run / "export"): p.read_bytes() for p in (run / "export").rglob("*.safetensors")}
    assert len(written) == 3
    assert all((tmp_path / "exported" / path).read_bytes() == content for path, content in written.items())
    assert {p.name for p in (tmp_path / "exported").iterdir()} == FOLDERS


def test_an_export_is_sampled_from_and_imported_as_the_run_itself(run, tmp_path):
    ours = _pictures(run, output_dir=tmp_path / "run", seed=5, steps=3)
    assert np.abs(_pictures(run / "export", output_dir=tmp_path / "export", seed=5, steps=3) - ours).max() <= 1
    done = {d.component: d for d in import_weights(run / "export", tmp_path / "in")}
    assert done.keys() == {"unet", "text_encoder", "vae"} and not any(any(d.wrong) for d in done.values())
    for part, theirs in (("unet", "unet"), ("text_encoder", "bert"), ("vae", "vqvae")):
        mine, exported = (next(f.glob("*.safetensors")) for f in (tmp_path / "in" / part, run / "export" / theirs))
        mine, exported = load_file(mine), load_file(exported)
        assert mine.keys() == exported.keys() and all(torch.equal(mine[n], exported[n]) for n in mine)
    assert (tmp_path / "in" / "tokenizer" / "tokenizer.json").is_file()


def test_a_run_starts_from_an_export_with_both_networks(run, sky, tmp_path, store):
    still = "--max-steps 1 --global-batch 2 --lr 1e-30 --optim.weight-decay 0 --optim.ema None"
    again = run_here(short(NAME, sky, f"{still}"), tmp_path / "run", store, init_from=str(run / "export")).output_dir
    for part in ("unet", "text_encoder"):
        before, after = _of_checkpoint(run, "ema", part), _of_checkpoint(again, "weights", part)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def _read(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def _files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_picture_is_a_png_as_large_as_it_was_made_and_a_film_of_it_is_refused(awake, tmp_path):
    options = {"prompt": PROMPTS, "device": "cpu", "log": False, "steps": 1}
    made = sample(str(awake), num=2, output_dir=tmp_path / "a", **options)
    pictures = [f"a-red-cloud-00{n}.png" for n in (0, 1)] + [f"slowly-a-blue-cloud-goes-up-00{n}.png" for n in (2, 3)]
    assert _files(made) == {*pictures, "sheet.png", "samples.json"}
    assert {_read(made / name).shape for name in pictures} == {(64, 64, 3)}
    assert _read(made / "sheet.png").size > sum(_read(made / name).size for name in pictures)  # all of them are on it
    with pytest.raises(UserError, match=f"--formats mp4 gif: {NAME} makes pictures, which are png"):
        sample(str(awake), formats=("mp4", "gif"), output_dir=tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_prompts_that_are_typed_give_the_pictures_of_a_list(awake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n"))
    typed = sample(str(awake), interactive=True, device="cpu", log=False, steps=2, output_dir=tmp_path / "typed")
    files = ["a-red-cloud-000.png", "slowly-a-blue-cloud-goes-up-001.png"]
    assert capsys.readouterr().out.splitlines() == [str(typed / name) for name in files]
    listed = sample(str(awake), prompt=PROMPTS, device="cpu", log=False, steps=2, output_dir=tmp_path / "listed")
    assert all(np.abs(_read(typed / name) - _read(listed / name)).max() <= 1 for name in files)
    assert _files(typed) == _files(listed) == {*files, "sheet.png", "samples.json"}


def test_pictures_that_a_kill_left_stay_and_the_rest_is_made(awake, tmp_path, capsys):
    given = {"prompt": ["red"], "num": 18, "device": "cpu", "log": False, "steps": 1, "batch_size": 9}
    given["output_dir"] = tmp_path / "s"
    made = sample(str(awake), **given)
    told, before = json.loads((made / "samples.json").read_text()), _read(made / "red-016.png")
    (made / "samples.json").write_text(json.dumps(told | {"complete": False}))  # as it is until the last
    (made / "red-016.png").unlink()
    os.utime(made / "red-017.png", (1, 1))
    assert sample(str(awake), **given) == made
    assert "goes on in" in capsys.readouterr().err and (made / "red-017.png").stat().st_mtime == 1
    assert np.abs(_read(made / "red-016.png") - before).max() <= 1
    assert json.loads((made / "samples.json").read_text()) == told


def test_a_caption_longer_than_the_text_encoder_is_sampled_and_its_rest_is_counted(awake, tmp_path, capsys):
    long = " ".join(["red"] * 80)  # 82 tokens with the two marks
    sample(str(awake), prompt=[long], device="cpu", log=False, steps=1, output_dir=tmp_path / "s")
    assert "the text encoder does not read the last 5 tokens of 'red red" in capsys.readouterr().err


def test_samples_of_pictures_are_pictures(run):
    folder = run / "samples" / "step-00000008"
    assert {p.suffix for p in folder.iterdir() if p.is_file()} == {".png", ".txt"}
    with Image.open(folder / "samples.png") as page:
        assert min(page.size) >= 256
    with Image.open(folder / "cells" / "samples-0.png") as cell:
        assert cell.size[0] == cell.size[1]


def test_a_start_without_a_tokenizer_says_where_one_is():
    with pytest.raises(UserError, match=r"system\.conditions\.0\.tokenizer is not set") as error:
        preflight(get("ldm-laion400m"))
    assert "--system.conditions.0.tokenizer" in str(error.value) and "google-bert/bert-base-uncased" in str(error.value)
