"""AnimateDiff from launch to what stock diffusers opens: motion modules learn on a frozen UNet, then a LoRA on those."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import registry
from core.checkpoint import checkpoints
from core.draw import Draw
from core.errors import UserError
from core.preflight import preflight
from core.slots import FreeInit, FreeNoise, StockDDIM
from core.sources import find_source, load_networks
from core.verbs.sample import sample
from core.weights.load import SHIPPED
from core.weights.stored import open_stored
from registry import get
from tests.engine.running import run_here, short

FAST = "--lr 2e-2 --optim.schedule.name constant --optim.schedule.warmup-steps 0 --optim.ema.decay 0.3 --max-steps 4"
BASE = SHIPPED / "animatediff-tiny"
PARTS = {"vae", "text_encoder", "tokenizer", "scheduler", "recipe.json"}
PROMPT = "a red cloud drifts slowly up"


@pytest.fixture(scope="module")
def ground(sky, _migrated_store, tmp_path_factory):
    """A base that can change, and a full run on it; then a LoRA run on what that has learnt."""
    folder = tmp_path_factory.mktemp("animatediff")
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    shutil.copytree(BASE / "unet", folder / "base" / "unet")
    store = f"sqlite:///{folder}/mlflow.db"
    base = f"--system.denoiser.weights {folder}/base"
    run_here(short("animatediff-full-tiny", sky, f"{FAST} {base}"), folder / "full", store)
    motion = f"--system.denoiser.motion.weights {folder}/full"
    run_here(short("animatediff-lora-tiny", sky, f"{FAST} {base} {motion}"), folder / "lora", store)
    return folder


def _numbers(run):
    return json.loads((checkpoints(run / "checkpoints")[0] / "state.json").read_text())


def test_a_checkpoint_holds_what_learns_and_a_fingerprint_of_the_rest(ground):
    full, lora = (open_stored(checkpoints(ground / run / "checkpoints")[0]).tensors for run in ("full", "lora"))
    adapter = MotionAdapter.from_pretrained(ground / "full" / "export" / "motion_adapter")
    own = {name for name, _ in adapter.named_parameters()}
    assert full.keys() == {f"{kind}.unet.{name}" for kind in ("weights", "ema") for name in own}
    assert len(lora) == 2 * 140 and all(".lora_" in name for name in lora)
    assert {"system.denoiser.weights"} == {f for f in _numbers(ground / "full")["frozen"] if "denoiser" in f}
    held = _numbers(ground / "lora")["frozen"]
    assert {"system.denoiser.weights", "system.denoiser.motion.weights"} == {f for f in held if "denoiser" in f}
    assert held["system.denoiser.weights"] == _numbers(ground / "full")["frozen"]["system.denoiser.weights"]


@functools.cache
def _ours(where, guidance):
    system, averaged = load_networks(find_source(str(where)))
    system.mode(training=False)
    draw = Draw.fixed("here", ["a"], [0], 1)
    sampler = StockDDIM(num_inference_steps=2, guidance_scale=guidance, negative_prompt="a blue cloud")
    video = system.sample([PROMPT], (8, 64, 64), sampler, draw)
    return ((video[0].permute(1, 2, 3, 0) + 1) / 2).numpy(), draw.noise((4, 8, 8, 8), "initial"), averaged


def _stock(ground, run, adapter):
    """AnimateDiff's pipeline of the base, an adapter, and the other parts of an export."""
    export = ground / run / "export"
    pipeline = AnimateDiffPipeline(
        vae=AutoencoderKL.from_pretrained(export / "vae").float(),
        text_encoder=CLIPTextModel.from_pretrained(export / "text_encoder").float(),
        tokenizer=CLIPTokenizer.from_pretrained(export / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(ground / "base" / "unet").float(),
        motion_adapter=MotionAdapter.from_pretrained(adapter),
        scheduler=DDIMScheduler.from_pretrained(export / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _frames(pipeline, noise, guidance):
    made = pipeline(
        PROMPT, negative_prompt="a blue cloud", num_frames=8, height=64, width=64, num_inference_steps=2,
        guidance_scale=guidance, latents=noise.clone(), output_type="np",
    )  # fmt: skip
    return made.frames[0]


@pytest.mark.parametrize(("run", "guidance"), [("full", 3.0), ("lora", 3.0)])
def test_the_stock_pipeline_makes_our_frames_of_the_same_noise(ground, run, guidance):
    ours, noise, averaged = _ours(ground / run, guidance)
    assert averaged
    pipeline = _stock(ground, run, ground / "full" / "export" / "motion_adapter")
    if run == "lora":
        without = _frames(pipeline, noise, guidance)
        assert np.abs(without - ours).max() > 0.02
        pipeline.load_lora_weights(ground / "lora" / "export" / "lora")
    assert np.abs(_frames(pipeline, noise, guidance) - ours).max() < 2e-3
    assert np.abs(ours[1:] - ours[:-1]).max() > 0.01 and ours.std() > 0.02


def test_an_export_is_what_has_learnt_and_its_samples_are_those_of_the_run(ground):
    for run, learnt in (("full", "motion_adapter"), ("lora", "lora")):
        export = ground / run / "export"
        assert {p.name for p in export.iterdir()} == PARTS | {learnt}
        assert np.abs(_ours(export, 3.0)[0] - _ours(ground / run, 3.0)[0]).max() < 1e-5
    assert len(load_file(ground / "full" / "export" / "motion_adapter" / "diffusion_pytorch_model.safetensors")) == 189


def test_a_run_that_goes_on_with_another_base_is_refused_in_one_line(ground, sky, store):
    path = ground / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    kept, state = path.read_bytes(), load_file(path)
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, path)
    again = short("animatediff-full-tiny", sky, f"{FAST} --max-steps 5 --system.denoiser.weights {ground}/base")
    with pytest.raises(
        UserError, match=r"system.denoiser.weights: what is at .*base is not what the run was trained with"
    ):
        run_here(again, ground / "full", store, resume="auto")
    path.write_bytes(kept)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--system.denoiser.weights nowhere/at-all", r"system.denoiser.weights: weights 'nowhere/at-all': no such file or folder"),
        ("--system.denoiser.weights shipped:kl-vae-tiny", r"system.denoiser.weights: .*does not fit MotionUNet \(208 tensors\)"),
        ("--system.denoiser.motion.mid-block False --system.denoiser.motion.weights shipped:animatediff-tiny",
         r"system.denoiser.motion.weights: .*27 unused: mid_block.motion_modules.*motion.mid_block says whether"),
        ("--system.denoiser.trainable-modules .*attn1.*",
         r"system.denoiser.motion.weights is not set: a part of it is frozen and needs trained weights"),
    ],
)  # fmt: skip
def test_a_start_that_is_not_there_or_does_not_fit_is_one_line(flags, why, sky, store, tmp_path):
    with pytest.raises(UserError, match=why) as error:
        run_here(short("animatediff-full-tiny", sky, flags), tmp_path / "run", store)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_listed_with_where_it_was_published():
    recipe = get("animatediff-lora --system.denoiser.weights None --system.denoiser.motion.weights None")
    with pytest.raises(UserError) as error:
        preflight(recipe)
    said = str(error.value)
    assert "--system.denoiser.weights <what you got>" in said and "animatediff-motion-adapter-v1-5-2" in said


def test_each_layout_of_a_run_holds_what_its_export_holds_and_a_lora_is_folded_in(ground, tmp_path):
    def written(run, layout):
        to = tmp_path / f"{run}-{layout}"
        assert registry.main(["weights", "export", str(ground / run), "--layout", layout, "--to", str(to)]) == 0
        (file,) = to.glob("*.safetensors")
        return load_file(file)

    def exported(run, folder):
        return load_file(next((ground / run / "export" / folder).glob("*.safetensors")))

    adapter, lora = exported("full", "motion_adapter"), exported("lora", "lora")
    for mine, theirs in ((written("full", "adapter"), adapter), (written("lora", "lora"), lora)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    folded = written("lora", "adapter")
    layer = next(name for name in lora if name.endswith("to_q.lora_A.weight")).removesuffix(".lora_A.weight")
    update = 4.0 * lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]  # alpha 32, rank 8
    name = f"{layer.removeprefix('unet.')}.weight"
    assert update.abs().max() > 0 and torch.allclose(folded[name], adapter[name] + update, atol=1e-6)


@functools.cache
def _sampled(ground, **given):
    """Frames (T, H, W, 3) of levels that `sample` makes of the LoRA run, from its pngs."""
    out = ground / "sampled" / ("-".join(f"{name}-{value}" for name, value in given.items()) or "plain")
    sample(str(ground / "lora"), prompt=(PROMPT,), steps=2, formats=("png",), output_dir=out, log=False, **given)
    made_by = json.loads((out / "samples.json").read_text())
    return np.asarray(Image.open(out / made_by["clips"][0]["files"][0])).astype(int), made_by


def test_merged_sliced_and_in_half_precision_it_makes_the_same_clip(ground):
    plain, _ = _sampled(ground)
    assert plain.std() > 5
    for saving in ("merge_lora", "vae_slicing"):
        assert np.abs(_sampled(ground, **{saving: True})[0] - plain).max() <= 1
    half, made_by = _sampled(ground, precision="bf16")
    assert made_by["precision"] == made_by["held_in"] == "bf16"
    assert 0 < np.abs(half - plain).mean() < 4


def test_a_base_with_an_adapter_is_sampled_without_a_run(ground, tmp_path, capsys):
    parts = f"--system.denoiser.weights {ground}/base --system.denoiser.motion.weights {ground}/full"
    words = ["--prompt", PROMPT, "--steps", "2", "--formats", "png", "--device", "cpu", "--no-log"]
    for source, out in ((f"animatediff-full-tiny {parts}", "base"), (str(ground / "full" / "export"), "run")):
        assert registry.main(["sample", source, "--output-dir", str(tmp_path / out), *words]) == 0
    assert "these are samples of the weights that it starts from" in capsys.readouterr().err
    files = [next((tmp_path / out).glob("a-red*.png")) for out in ("base", "run")]
    mine, theirs = (np.asarray(Image.open(file)).astype(int) for file in files)
    assert np.abs(mine - theirs).max() <= 1 and mine.std() > 5  # an export has the latents' shift in its weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloaded_it_makes_the_same_clip_in_less_memory(ground):
    peaks, clips = [], []
    for offload in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        clips.append(_sampled(ground, device="cuda", offload=offload)[0])
        peaks.append(torch.cuda.max_memory_allocated())
    assert np.abs(clips[0] - clips[1]).max() <= 1 and peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("run", "flag", "why"),
    [
        ("full", "merge_lora", r"--merge-lora: animatediff-full-tiny has no LoRA"),
        ("full", "offload", r"--offload: there is no device beside the host's memory"),
    ],
)
def test_a_saving_without_effect_is_refused(run, flag, why, ground, tmp_path):
    with pytest.raises(UserError, match=why):
        sample(
            str(ground / run), prompt=(PROMPT,), device="cpu", output_dir=tmp_path / "out", log=False, **{flag: True}
        )


def test_free_init_samples_again_and_free_noise_makes_clips_longer_than_the_positions(ground):
    system, _ = load_networks(find_source(str(ground / "full")))
    system.mode(training=False)

    def clip(frames, **free):
        sampler = StockDDIM(num_inference_steps=2, guidance_scale=2.0, **free)
        return system.sample([PROMPT], (frames, 64, 64), sampler, Draw.fixed("here", ["a"], [0], 1))

    plain = clip(8)
    assert torch.equal(clip(8, free_init=FreeInit(num_iters=1)), plain)
    assert torch.equal(clip(8, free_noise=FreeNoise(context_length=8)), plain)
    again = clip(8, free_init=FreeInit(num_iters=2))
    assert again.shape == plain.shape and not torch.allclose(again, plain, atol=1e-2)
    with pytest.raises(UserError, match=r"--sampler\.free-noise=FreeNoise"):
        clip(11)
    long = clip(11, free_noise=FreeNoise(context_length=8))
    assert long.shape[2] == 11 and torch.equal(clip(8), plain)  # the network is as it was


def test_windows_that_no_network_has_are_refused_with_the_recipe():
    with pytest.raises(UserError, match=r"validation.sampler.free_noise: its denoiser has no motion modules"):
        get("lvdm-short-sky-tiny --validation.sampler.free-noise=FreeNoise")
    with pytest.raises(UserError, match=r"free_noise: the motion modules have positions for 8 frames"):
        get("animatediff-full-tiny --validation.sampler.free-noise=FreeNoise")
