"""Data of many shapes through the loop: every update is of one bucket, and the position is kept."""

import json

import numpy as np
import pytest
from PIL import Image

from core.caches.opened import open_cache
from core.errors import UserError
from core.positions import START, plan_of
from core.preflight import preflight
from data.slots import BucketedVideos, Buckets
from tests.data.videos import KINDS, write_video
from tests.engine.processes import run_ranks
from tests.engine.running import losses, run_here, short

SIZES = {"wide": (48, 64), "tall": (64, 48)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three wide clips, two tall ones, one shorter, and three pictures, told in words."""
    root = tmp_path_factory.mktemp("mixed")
    records = []
    for number, (kind, frames) in enumerate([("wide", 12)] * 3 + [("tall", 12)] * 2 + [("wide", 7)]):
        height, width = SIZES[kind]
        write_video(root / f"{number}.mp4", frames, size=(height, width), options=KINDS["h264.mp4"][2])
        records.append({"path": f"{number}.mp4", "num_frames": frames, "fps": 10.0, "cap": f"a {kind} red cloud"})
        records[-1]["resolution"] = {"height": height, "width": width}
    for number in range(3):
        Image.fromarray(np.full((48, 64, 3), 60 * number, np.uint8)).save(root / f"{number}.png")
        records.append({"path": f"{number}.png", "cap": "grey", "resolution": {"height": 48, "width": 64}})
    (root / "all.json").write_text(json.dumps(records))
    (root / "data.txt").write_text(f"{root}, all.json\n")
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))


def recipe(mixed, sky, flags="", **buckets):
    data = BucketedVideos(
        root=mixed / "data.txt", split="all", held_out_split="all", num_frames=9, min_frames=5, max_hxw=4096,
        min_hxw=256, hw_stride=16, train_fps=10.0, drop_short_ratio=0.0, buckets=Buckets(**buckets),
    )  # fmt: skip
    words = f"--validation.batch-size 1 --validation.num-samples 1 --global-batch 2 --batch-size 1 {flags}"
    return short("lvdm-text2video-tiny", sky, words).but(data=data)


def test_a_run_on_buckets_goes_on_bit_for_bit_and_says_what_is_in_them(mixed, sky, store, tmp_path):
    whole = run_here(recipe(mixed, sky), tmp_path / "whole", store)
    run_here(recipe(mixed, sky, "--max-steps 3"), tmp_path / "cut", store)
    run_here(recipe(mixed, sky), tmp_path / "cut", store, resume="auto")
    assert losses(tmp_path / "cut") == losses(whole.output_dir) and len(losses(whole.output_dir)) == 6
    said = (whole.output_dir / "run.log").read_text()
    assert "planned: 9 of 9 records (3 images, 6 videos), 4 buckets" in said and "9x48x64" in said
    assert (whole.output_dir / "samples" / "step-00000006" / "samples.mp4").is_file()


def test_two_ranks_share_updates_of_one_bucket_and_have_the_losses_of_one(mixed, sky, store, tmp_path):
    flags = "--max-steps 4"
    one = run_ranks(recipe(mixed, sky, flags, multiple=2), 1, tmp_path / "one", store)
    two = run_ranks(recipe(mixed, sky, flags, multiple=2), 2, tmp_path / "two", store)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_every_update_is_of_one_bucket_and_an_epoch_shows_each_sample_once(mixed, sky):
    slot = recipe(mixed, sky)
    data = slot.data.build()
    plan = plan_of(data, slot.loop, 1, None)
    position, seen = START, []
    for _ in range(plan.steps(4.0)):
        keys, position = plan.update(position)
        samples = [data[key] for key in keys]
        assert len({tuple(sample["pixel_values"].shape) for sample in samples}) == 1
        assert plan.accumulation(keys, 1) == 2
        seen += [(key.epoch, sample["id"]) for key, sample in zip(keys, samples, strict=True)]
    assert len(seen) == len(set(seen)) and len({name for _, name in seen}) == 9
    assert plan.steps(2.0) < plan.steps(2.5) <= plan.steps(3.0)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--validation.batch-size 2", r"validation.batch_size: must be 1, because BucketedVideos has samples of many"),
        ("--validation.metric-clips 8", r"validation.metric_clips: must be 0"),
    ],
)
def test_what_needs_one_shape_is_refused_by_field(flags, why, mixed, sky):
    with pytest.raises(UserError, match=why):
        preflight(recipe(mixed, sky, flags))


def test_no_cache_and_no_ranks_that_do_not_divide_an_update(mixed, sky, tmp_path):
    slot = recipe(mixed, sky)
    with pytest.raises(UserError, match=r"its samples have many shapes, of which there is no cache"):
        open_cache(tmp_path, slot, None, None)
    with pytest.raises(
        UserError, match=r"an update of 2 samples cannot be shared by 3 ranks: set data.buckets.multiple"
    ):
        plan_of(slot.data.build(), slot.loop, 3, None)
