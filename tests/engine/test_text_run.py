"""A run that is told a text, from launch to samples: the full-size recipe with every size cut, on captioned videos."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.media import write_mp4
from core.slots import Launch
from core.train import train
from core.validate import captions
from core.verbs.sample import sample
from registry import get
from tests.engine.processes import command, run_ranks
from tests.engine.running import SHORT, losses
from tests.models.tiny_text import SIZES, write_text

CUT = {
    "data.num-frames": 4, "data.resolution": 16, "system.denoiser.in-channels": 3, "system.denoiser.out-channels": 3,
    "system.denoiser.model-channels": 8, "system.denoiser.channel-mult": "1,2", "system.denoiser.num-res-blocks": 1,
    "system.denoiser.attention-resolutions": 2, "system.denoiser.num-heads": 2, "system.denoiser.context-dim": 24,
    "system.denoiser.norm-num-groups": 4, "system.conditions.0.dropout": 0.25, "precision": "fp32",
    "validation.sampler.eta": 0.0, **{f"system.conditions.0.{name.replace('_', '-')}": v for name, v in SIZES.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A text encoder, and captioned videos in two splits."""
    root = tmp_path_factory.mktemp("ground")
    write_text(root / "text")
    for split, count in (("train", 6), ("test", 3)):
        for i in range(count):
            video = root / "videos" / split / f"{i}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(video, np.full((8, 32, 32, 3), 40 * i, np.uint8), 8)
            video.with_suffix(".txt").write_text(f"{split} cloud {i}")
    return root


def _flags(ground, **more) -> list[str]:
    words = dict(zip(SHORT.split()[::2], SHORT.split()[1::2], strict=True))
    words |= {f"--{name}": str(value) for name, value in CUT.items()}
    words |= {"--system.conditions.0.weights": str(ground / "text"), "--data-root": str(ground / "videos")}
    words |= {f"--{name.replace('_', '-').replace('--', '.')}": str(value) for name, value in more.items()}
    return ["--system.autoencoder=None", *(word for pair in words.items() for word in pair)]


@pytest.fixture(scope="module")
def run(ground, _migrated_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    launch = Launch(output_dir=folder / "run", store=f"sqlite:///{folder}/mlflow.db", device="cpu")
    return train(get("lvdm-text2video", *_flags(ground)), launch)


def test_the_run_leaves_samples_with_their_texts_and_the_folders_of_a_pipeline(run, ground):
    shown = run.output_dir / "samples" / "step-00000006"
    assert {"samples.png", "samples.mp4", "samples.txt"} <= {p.name for p in shown.iterdir()}
    texts = (shown / "samples.txt").read_text().splitlines()
    assert len(texts) == 2 and set(texts) <= {f"test cloud {i}" for i in range(3)}
    held_out = get("lvdm-text2video", *_flags(ground)).validation_data.build()
    assert texts == captions(held_out, 2)
    exported = {p.name for p in (run.output_dir / "export").iterdir()}
    assert exported == {"unet", "text_encoder", "tokenizer", "scheduler", "recipe.json"}
    assert np.isfinite(run.metrics["val/loss"])


def test_a_run_goes_on_bit_for_bit_with_its_captions_left_out_as_before(run, ground, store, tmp_path):
    def go(**launch):
        return train(
            get("lvdm-text2video", *_flags(ground, **launch.pop("flags", {}))),
            Launch(store=store, device="cpu", **launch),
        )

    first = go(output_dir=tmp_path / "half", flags={"max_steps": 3}).output_dir
    go(resume=str(first))
    whole = losses(run.output_dir)
    assert {step: loss for step, loss in losses(first).items() if step > 3} == {s: x for s, x in whole.items() if s > 3}


def test_the_exported_text_encoder_serves_another_run(run, ground):
    recipe = get("lvdm-text2video", *_flags(ground, **{"system--conditions--0--weights": run.output_dir}))
    system = recipe.system.build()
    system.text.load(recipe.system.conditions[0].weights)
    again = get("lvdm-text2video", *_flags(ground)).system.build()
    again.text.load(str(ground / "text"))
    assert torch.equal(system.states(["a cloud"]), again.states(["a cloud"]))


def test_sample_makes_clips_of_each_prompt_and_says_what_made_them(run, tmp_path):
    made = sample(
        str(run.output_dir), prompt=["red", "blue"], num=2, output_dir=tmp_path / "s", device="cpu", log=False
    )
    told = json.loads((made / "samples.json").read_text())
    assert [clip["prompt"] for clip in told["clips"]] == ["red", "red", "blue", "blue"]
    assert told["sampler"]["guidance_scale"] == 9.0


def test_sample_on_the_command_line_takes_several_prompts(run, tmp_path):
    words = ["sample", str(run.output_dir), "--prompt", "red clouds", "blue", "--output-dir", "made", "--no-log"]
    done = command(*words, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "made" / "samples.json").read_text())
    assert [clip["files"][0] for clip in told["clips"]] == ["red-clouds-000.mp4", "blue-001.mp4"]


def test_prompts_come_from_a_file_one_a_line(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("rot / 红色\n\n  blue \nrot / 红色\n", encoding="utf-8")
    made = sample(
        str(run.output_dir), prompts=tmp_path / "prompts.txt", output_dir=tmp_path / "s", device="cpu", log=False,
        guidance_scale=2.0, negative_prompt="grey", formats=("png",),
    )  # fmt: skip
    told = json.loads((made / "samples.json").read_text())
    assert [clip["files"] for clip in told["clips"]] == [["rot-红色-000.png"], ["blue-001.png"], ["rot-红色-002.png"]]
    assert [clip["copy"] for clip in told["clips"]] == [0, 0, 1]
    assert told["sampler"]["negative_prompt"] == "grey"


def test_a_clip_of_a_prompt_does_not_depend_on_the_prompts_beside_it(run, tmp_path):
    options = {"device": "cpu", "log": False, "formats": ("png",)}
    alone = sample(str(run.output_dir), prompt=["blue"], output_dir=tmp_path / "a", **options)
    beside = sample(str(run.output_dir), prompt=["red", "blue"], output_dir=tmp_path / "b", **options)
    clips = [np.asarray(Image.open(p)).astype(int) for p in (alone / "blue-000.png", beside / "blue-001.png")]
    assert np.abs(clips[0] - clips[1]).max() <= 1
    assert np.abs(clips[0] - np.asarray(Image.open(beside / "red-000.png")).astype(int)).mean() > 2


def typing(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_prompts_that_are_typed_are_made_one_after_the_other_until_the_input_ends(run, tmp_path, capsys, monkeypatch):
    """And they are the clips of a file with these lines, one typed twice included."""
    options = {"device": "cpu", "log": False, "formats": ("png",)}
    typing(monkeypatch, "red\n\nblue sky\nred")
    typed = sample(str(run.output_dir), interactive=True, output_dir=tmp_path / "typed", **options)
    files = ["red-000.png", "blue-sky-001.png", "red-002.png"]
    assert capsys.readouterr().out.splitlines() == [str(typed / name) for name in files]
    assert (typed / "sheet.png").exists() and json.loads((typed / "samples.json").read_text())["complete"]
    (tmp_path / "p.txt").write_text("red\nblue sky\nred\n")
    given = sample(str(run.output_dir), prompts=tmp_path / "p.txt", output_dir=tmp_path / "given", **options)
    one, other = ([np.asarray(Image.open(folder / name)).astype(int) for name in files] for folder in (typed, given))
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(one, other, strict=True))
    assert np.abs(one[0] - one[2]).mean() > 2


def test_an_input_without_a_prompt_leaves_nothing_behind(run, tmp_path, monkeypatch):
    typing(monkeypatch, "\n  \n")
    with pytest.raises(UserError, match="--interactive: no prompt was typed"):
        sample(str(run.output_dir), interactive=True, output_dir=tmp_path / "none", device="cpu")
    assert not (tmp_path / "none").exists()


def test_a_prompt_that_is_longer_than_what_is_read_is_said_and_made(run, tmp_path, capsys):
    long = "cloud " * 1700
    made = sample(
        str(run.output_dir), prompt=[long, "red"], output_dir=tmp_path / "s", device="cpu", log=False, formats=("png",)
    )
    said = capsys.readouterr().err
    assert re.search(r"note: the text encoder does not read the last [\d,]+ tokens of 'cloud cloud", said)
    assert said.count("does not read") == 1
    assert json.loads((made / "samples.json").read_text())["clips"][0]["prompt"] == long


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "is told a text: give --prompt, --prompts FILE or --interactive"),
        ({"prompt": ["a"], "interactive": True}, "--prompt and --interactive: give prompts in one way"),
        ({"prompts": Path("nowhere.txt")}, "--prompts nowhere.txt: cannot be read as text"),
        ({"prompt": ["a", "\udcff"]}, r"--prompt: '\\udcff' is not UTF-8"),
        ({"interactive": True, "nproc": 2}, "--interactive: prompts are typed to one process"),
        ({"prompt": ["a"], "guidance_scale": 1.0, "negative_prompt": "b"}, "no effect at guidance scale 1"),
    ],
)
def test_prompts_that_nobody_would_read_are_refused(run, given, why):
    with pytest.raises(UserError, match=why):
        sample(str(run.output_dir), device="cpu", **given)


def test_two_processes_make_the_run_of_one(run, ground, store, tmp_path):
    words = _flags(ground, batch_size=2)
    run_ranks(get("lvdm-text2video", *words), 2, tmp_path / "two", store)
    assert losses(tmp_path / "two") == pytest.approx(losses(run.output_dir), rel=1e-4)
    texts = [
        (folder / "samples" / "step-00000006" / "samples.txt").read_text()
        for folder in (tmp_path / "two", run.output_dir)
    ]
    assert texts[0] == texts[1]


def test_a_prompt_for_a_recipe_without_a_text_is_refused(sky, store, tmp_path):
    from tests.engine.running import run_here, short

    out = run_here(short("lvdm-video-vae-tiny", sky, "--max-steps 1"), tmp_path / "vae", store).output_dir
    with pytest.raises(UserError, match="--prompt: lvdm-video-vae-tiny is told no text"):
        sample(str(out), prompt=["a"], num=1, device="cpu")
