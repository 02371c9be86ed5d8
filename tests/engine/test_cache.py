"""Caches: what is computed once gives the losses of what is computed every time, and what is stale or damaged is said."""

import functools
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.build import frozen_networks
from core.caches.facts import NAME, Part
from core.caches.opened import open_cache
from core.caches.shards import EMPTY, INDEX, shard_path
from core.caches.write import _keys, make
from core.draw import Draw
from core.errors import UserError
from core.preflight import preflight
from core.slots import Launch
from core.weights.load import SHIPPED
from registry import get, main
from tests.engine.processes import SERVER, begin
from tests.engine.running import TWINS, losses, run_here, short

LATENT = [name for name in TWINS if getattr(get(name).system, "denoiser", None)]
"""Every twin that is trained on latents."""
SKY, TEXT, TRAINED_TEXT = "lvdm-short-sky-tiny", "lvdm-text2video-tiny", "ldm-laion400m-tiny"
SILENT = "--validation.num-samples 0"
VAE, WORDS = "system.autoencoder.weights", "system.conditions.0.weights"


def quietly(recipe, to: Path, draws: int = 1, samples: int = 2) -> bool:
    return make(recipe, to, draws=draws, samples_per_shard=samples, device="cpu", say=lambda line: None)


def opened(recipe, folder: Path):
    return open_cache(folder, recipe, recipe.data.build(), recipe.validation_data.build())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def caches(sky, tmp_path_factory):
    """The cache of a twin, with two draws of each sample."""
    root = tmp_path_factory.mktemp("caches")

    @functools.cache
    def of(name: str) -> Path:
        assert quietly(short(name, sky), root / name, draws=2, samples=3)
        return root / name

    return of


@pytest.fixture
def told(caches, tmp_path) -> Path:
    """A cache of the text twin that may be harmed."""
    return Path(shutil.copytree(caches(TEXT), tmp_path / "told"))


# ------------------------------------------------------------------------------------------------------- the same run


def test_a_run_from_a_cache_has_the_losses_of_one_without(caches, sky, store, tmp_path):
    """Two epochs, of which the cache has both draws, so first frames may be random."""
    recipe = short(SKY, sky, f"{SILENT} --max-steps 3")
    whole = run_here(recipe, tmp_path / "without", store)
    again = run_here(recipe, tmp_path / "with", store, cache=caches(SKY))
    ours, theirs = losses(tmp_path / "with"), losses(tmp_path / "without")
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=0, abs=1e-6)
    assert again.metrics["val/loss"] == pytest.approx(whole.metrics["val/loss"], rel=0, abs=1e-6)
    assert not (tmp_path / "with" / "samples").exists()


def test_the_same_with_captions_that_are_dropped_and_encoders_whose_weights_are_absent(caches, sky, store, tmp_path):
    """And a run goes on without its cache once the weights are there."""
    recipe = short(TEXT, sky, f"{SILENT} --max-steps 3 --system.conditions.0.dropout 0.5")
    gone = short(TEXT, sky, f"{SILENT} --max-steps 2 --system.conditions.0.dropout 0.5 --{VAE} gone/vae --{WORDS} None")
    run_here(recipe, tmp_path / "without", store)
    out = run_here(gone, tmp_path / "with", store, cache=caches(TEXT)).output_dir
    assert {p.name for p in (out / "export").iterdir()} == {"unet", "scheduler", "recipe.json"}
    run_here(recipe, out, store, resume=str(out))
    ours, theirs = losses(out), losses(tmp_path / "without")
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=0, abs=1e-6)


def test_weights_of_encoders_are_asked_for_where_samples_need_them(caches):
    recipe = get(TEXT, f"--{WORDS}", "None")
    silent = recipe.but(validation=recipe.validation.but(num_samples=0, metric_clips=0))
    preflight(silent, Launch(cache=caches(TEXT)))
    for asked, launch in ((recipe, Launch(cache=caches(TEXT))), (silent, Launch())):
        with pytest.raises(UserError, match=rf"{WORDS} is not set"):
            preflight(asked, launch)


@pytest.mark.parametrize("name", LATENT)
def test_every_twin_trained_on_latents_gets_what_it_would_compute(name, caches, sky):
    """Latents, and the states of captions some of which are dropped, at the second draw."""
    recipe = short(name, sky)
    same = {"animatediff-lora-tiny": "animatediff-full-tiny", "animatediff-motion-lora-tiny": "animatediff-full-tiny"}
    made = opened(recipe, caches(same.get(name, name)))  # the denoiser is no fact of a cache
    system, keys = frozen_networks(recipe, torch.device("cpu")), [(recipe.loop.seed, 1, item, item) for item in (4, 1)]
    bare, kept = (each.collate([each[key] for key in keys]) for each in (recipe.data.build(), made.training))
    assert "pixel_values" not in kept and kept["id"] == bare["id"] and kept.get("caption") == bare.get("caption")
    draw = Draw.training(0, 0, [4, 1], 8)
    assert torch.equal(system.latents(kept, draw), system.latents(bare, draw))
    if system.reads_frozen_text:
        states, expected = (system._told(batch, [False, True])[0] for batch in (kept, bare))
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_a_worker_that_reads_a_cache_maps_its_files_itself(caches, sky):
    recipe = short(TEXT, sky)
    training = opened(recipe, caches(TEXT)).training
    there = pickle.loads(pickle.dumps(training))  # noqa: S301
    for name, value in training[0, 0, 3, 0].items():
        other = there[0, 0, 3, 0][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_constants_of_latents_are_those_of_the_weights_at_the_time_of_training(caches, sky, tmp_path):
    copy = Path(shutil.copytree(SHIPPED / "kl-vae-tiny", tmp_path / "vae"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    places = ("shipped:kl-vae-tiny", copy, "gone")
    found = [opened(short(TEXT, sky, f"{SILENT} --{VAE} {place}"), caches(TEXT)) for place in places]
    assert [made.constants[0] for made in found] == [config["scaling_factor"], 0.5, config["scaling_factor"]]
    assert found[1].frozen[VAE]["constants"][0] == 0.5


def test_a_third_epoch_sees_the_clips_of_the_first(caches, sky):
    recipe = short(SKY, sky)
    training = opened(recipe, caches(SKY)).training
    first, second, third = (training[recipe.loop.seed, epoch, 2, 0]["posterior_mean"] for epoch in range(3))
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_a_run_from_a_cache_makes_samples_and_an_export_with_networks_that_are_loaded_for_them(
    caches, sky, store, tmp_path
):
    recipe = short(TRAINED_TEXT, sky, "--max-steps 1")
    result = run_here(recipe, tmp_path / "run", store, cache=caches(TRAINED_TEXT))
    shown = {p.name for p in (result.output_dir / "samples" / "step-00000001").iterdir()}
    assert {"samples.png", "reconstructions.png", "samples.txt"} <= shown
    assert (result.output_dir / "export" / "vqvae" / "diffusion_pytorch_model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------- making the cache


@given(samples=st.integers(1, 40), per_shard=st.integers(1, 9), draws=st.integers(1, 4), world=st.integers(1, 5))
def test_the_shards_of_all_ranks_have_every_sample_at_every_draw_once(samples, per_shard, draws, world):
    part = Part("training", 5, draws, samples * draws, per_shard)
    shares = [range(rank, part.shards, world) for rank in range(world)]
    keys = {number: _keys(part, range(samples), number) for share in shares for number in share}
    assert sum(map(len, shares)) == len(keys) == part.shards and max(map(len, keys.values())) <= part.rows_per_shard
    rows = [key for number in sorted(keys) for key in keys[number]]
    assert [(item, draw) for _, draw, item, _ in rows] == [(i, d) for i in range(samples) for d in range(draws)]
    assert all([place for *_, place in shard] == list(range(len(shard))) for shard in keys.values())


def _make(recipe, to: Path, said: Path, rank: int, world: int, killed_after: int) -> None:
    """A process that caches, and dies by kill -9 after so many shards."""
    begin(said, 1, rank, world, 0)
    done: list[str] = []

    def say(line: str) -> None:
        done.append(line)
        if len(done) == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    make(recipe, to, draws=1, samples_per_shard=1, device="cpu", say=say)
    sys.exit(0)


def test_a_cache_that_was_killed_and_gone_on_with_by_two_processes_is_that_of_one(sky, tmp_path):
    recipe, said, threads = short(SKY, sky), tmp_path / "stderr", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert quietly(recipe, tmp_path / "one", samples=1)
    finally:
        torch.set_num_threads(threads)
    killed = SERVER.Process(target=_make, args=(recipe, tmp_path / "two", said, 0, 1, 2))
    killed.start()
    killed.join(100)
    assert killed.exitcode == -signal.SIGKILL, said.read_text()
    before = files(tmp_path / "two")
    assert sum(name.endswith(".arrow") for name in before) == 2
    with pytest.raises(UserError, match="is not finished: `data cache` goes on with it"):
        opened(recipe, tmp_path / "two")
    times = {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in before}
    (tmp_path / "two" / "training" / ".partial-shard-00003.safetensors-1").write_bytes(b"of a kill")
    shard_path(tmp_path / "two" / "training", 4).write_bytes(b"without its rows")
    ranks = [SERVER.Process(target=_make, args=(recipe, tmp_path / "two", said, rank, 2, 0)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0], said.read_text()
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert times == {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in before}


def test_the_command_makes_a_cache_and_says_how_to_train_from_it(sky, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [SKY, "--data-root", str(sky), "--data.split", "test", "--validation.num-batches", "1"]
    assert main(["data", "cache", *words, "--samples-per-shard", "3"]) == 0
    said = capsys.readouterr().out
    assert "caches/lvdm-short-sky-tiny/training/shard-00001: 1 clips, 2 of 2" in said
    assert "python -m registry run lvdm-short-sky-tiny --cache caches/lvdm-short-sky-tiny" in said
    assert main(["data", "cache", *words, "--samples-per-shard", "4"]) == 2
    assert "holds another cache: training: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("kl-vae-tiny", "trains its autoencoder"),
        ("lvdm-short-sky-tiny --system.autoencoder=None", "is trained on pixels"),
    ],
)
def test_what_has_no_latents_is_refused(recipe, why, tmp_path):
    with pytest.raises(UserError, match=why):
        quietly(get(recipe), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_with_other_files_is_left_alone(sky, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that no cache wrote \(thesis.txt\)"):
        quietly(short(SKY, sky), tmp_path)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "flags",
    ["--lr 1e-4", "--max-steps 9", "--global-batch 2", "--seed 4", "--system.denoiser.model-channels 64",
     "--system.conditions.0.dropout 0.5", "--validation.num-batches 1", "--data.max-bad-share 0.5"],
)  # fmt: skip
def test_what_decides_no_latent_makes_no_cache_stale(flags, caches, sky):
    opened(short(TEXT, sky, flags), caches(TEXT))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--resolution 32", "data.resolution: 64 there, 32 here"),
        ("--num-frames 4", "data.num_frames: 8 there, 4 here"),
        ("--data.horizontal-flip 0.5", "data.horizontal_flip: 0.0 there, 0.5 here"),
        ("--data.split test", "data.split: train there, test here"),
        ("--data.max-samples 5", r"data \(samples\): 6 there, 5 here"),
        ("--system.autoencoder.dtype bf16", "system.autoencoder.dtype: fp32 there, bf16 here"),
        ("--system.conditions.0.max-length 20", r"system.conditions.0.max_length: 24 there, 20 here"),
    ],
)
def test_a_stale_cache_is_refused_with_the_field_and_both_values(flags, field, caches, sky):
    with pytest.raises(UserError, match=field):
        opened(short(TEXT, sky, flags), caches(TEXT))


def test_more_held_out_samples_than_were_kept_are_refused(caches, sky, tmp_path):
    few = short(SKY, sky, "--validation.num-batches 1")
    assert quietly(few, tmp_path / "few")
    with pytest.raises(UserError, match=r"validation\.num_batches: 4 held-out samples are asked for and .* has 2"):
        opened(short(SKY, sky), tmp_path / "few")


def _moved(kind: str, root: Path) -> Path:
    """A copy of shipped weights, of which one layer, or two words, are changed."""
    name = {"vae": "kl-vae-tiny", "text": "clip-text-tiny", "words": "clip-text-tiny"}[kind]
    copy = Path(shutil.copytree(SHIPPED / name, root / name))
    if kind == "words":
        file = copy / "tokenizer" / "vocab.json"
        words = json.loads(file.read_text())
        (a, one), (b, other) = list(words.items())[-2:]
        file.write_text(json.dumps(words | {a: other, b: one}))
        return copy
    file = next(copy.rglob("*.safetensors"))
    state = load_file(file)
    changed = max(state, key=lambda key: state[key].numel())
    save_file(state | {changed: state[changed] * 1.01}, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("kind", "field", "what"), [("vae", VAE, "tensors"), ("text", WORDS, "tensors"), ("words", WORDS, "vocabulary")]
)
def test_other_weights_make_a_cache_stale_and_the_same_at_another_place_do_not(
    kind, field, what, caches, sky, store, tmp_path
):
    same = SHIPPED / ("kl-vae-tiny" if kind == "vae" else "clip-text-tiny")
    opened(short(TEXT, sky, f"--{field} {same}"), caches(TEXT))
    other = short(TEXT, sky, f"--{field} {_moved(kind, tmp_path)}")
    with pytest.raises(UserError, match=rf"{field}: .* is not what the cache was made with \({what} changed\)"):
        run_here(other, tmp_path / "run", store, cache=caches(TEXT))
    assert not (tmp_path / "run").exists()


def test_other_content_makes_a_cache_stale(told, sky, tmp_path):
    root = Path(shutil.copytree(sky.parent / "clouds", tmp_path / "clouds"))
    recipe = short(TEXT, sky, f"--data-root {root}")
    opened(recipe, told)  # the place does not matter
    clips = sorted(root.rglob("*.mp4"))
    contents = [clip.read_bytes() for clip in clips]
    for clip, content in zip(clips, [*contents[1:], contents[0]], strict=True):
        clip.write_bytes(content)
    with pytest.raises(UserError, match=r"stale: the pixels or the caption of .*\.mp4 are not those|fingerprint"):
        opened(recipe, told)


# ------------------------------------------------------------------------------------------------------------- damage


def _all_read(recipe, folder: Path) -> None:
    training = opened(recipe, folder).training
    for item in range(len(training)):
        for epoch in range(2):
            training[0, epoch, item, 0]


@pytest.mark.parametrize("how", ["byte", "short", "gone", "header", "rows"])
def test_a_damaged_shard_is_named_and_made_again_alone(how, told, sky):
    recipe, path, good = short(TEXT, sky), shard_path(told / "training", 1), files(told)
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "rows":
        path.with_suffix(".arrow").write_bytes(b"ARROW1")
    elif how == "short":
        path.write_bytes(content[:-100])
    else:
        content[-1000 if how == "byte" else 20] ^= 255
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors .*the same `data cache` as before"):
        _all_read(recipe, told)
    other = shard_path(told / "training", 0).stat().st_mtime_ns
    assert quietly(recipe, told, draws=2, samples=3)
    assert shard_path(told / "training", 0).stat().st_mtime_ns == other
    assert files(told).keys() == good.keys()
    _all_read(recipe, told)


@pytest.mark.parametrize("name", [NAME, f"training/{INDEX}", EMPTY])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1}', b"[" * 100_000])
def test_files_of_a_cache_that_are_something_else_are_refused_in_a_line(name, content, told, sky):
    (told / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        opened(short(TEXT, sky), told)
    assert str(told) in str(error.value) and "\n" not in str(error.value)


def test_a_part_cannot_lead_out_of_the_folder_of_its_cache(told, sky):
    about = json.loads((told / NAME).read_text())
    about["training"]["name"] = "../elsewhere"
    (told / NAME).write_text(json.dumps(about))
    with pytest.raises(UserError, match="cannot be read as that of a cache"):
        opened(short(TEXT, sky), told)
