"""A run that is told a text, from launch to samples: the full-size recipe with every size cut, on captioned videos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.media import write_mp4
from core.slots import Launch
from core.train import train
from core.validate import captions
from core.verbs.sample import sample
from registry import get
from tests.engine.running import SHORT, losses, registry
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
    assert exported == {"unet", "text_encoder", "tokenizer", "scheduler"}
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


def test_sample_takes_prompts_in_turn_and_says_what_made_each(run, tmp_path):
    made = sample(str(run.output_dir), prompt=["red", "blue"], num=3, output_dir=tmp_path / "s", device="cpu")
    told = json.loads((made / "samples.json").read_text())
    assert told["prompts"] == ["red", "blue", "red"]
    assert told["guidance_scale"] == 9.0


def test_sample_on_the_command_line_takes_several_prompts(run, tmp_path):
    words = ["sample", str(run.output_dir), "--prompt", "red clouds", "blue", "--num", "2", "--output-dir", "made"]
    done = registry(*words, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "made" / "samples.json").read_text())["prompts"] == ["red clouds", "blue"]


def test_two_processes_make_the_run_of_one(run, ground, store, tmp_path):
    words = _flags(ground, batch_size=2)
    done = registry(
        "run", "lvdm-text2video", *words, "--output-dir", "two", "--store", store, "--device", "cpu",
        cwd=tmp_path, nproc=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
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
