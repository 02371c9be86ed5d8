"""Sky Timelapse and UCF-101 folders: which clips are found, which frames are read, which pixels come out."""

import os
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from core.errors import UserError
from data.frames import FrameClips
from data.samples import collate
from data.slots import FrameFolders
from tests.data.conftest import write_clip, write_noise

on_one_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def clips(root: Path, **changes: Any) -> FrameClips:
    return FrameFolders(**{"root": root, "num_frames": 5, "resolution": 4, **changes}).build()


def numbers(sample: dict[str, Any]) -> list[int]:
    """Which frames of the clip were read: their grey values."""
    return torch.round((sample["pixel_values"][0, :, 0, 0] + 1) * 127.5).int().tolist()


# ---- what is found ----


def test_sky_finds_clips_of_enough_frames_and_counts_the_others(sky_folders: Path):
    found = clips(sky_folders, num_frames=6)
    assert found.ids == ["train/a/a_2", "train/b/b_1"]
    assert found.dropped == {"shorter than 6 frames": 1}
    assert found.describe()["dropped: shorter than 6 frames"] == 1


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("train", ["train/a/a_1", "train/a/a_2", "train/b/b_1"]),
        ("test", ["test/c/c_1"]),
        ("all", ["test/c/c_1", "train/a/a_1", "train/a/a_2", "train/b/b_1"]),
    ],
)
def test_each_split_gives_its_clips(sky_folders: Path, split: str, ids: list[str]):
    assert clips(sky_folders, split=split).ids == ids


def test_an_empty_split_reads_the_root_itself(sky_folders: Path):
    assert clips(sky_folders / "train", split="").ids == ["a/a_1", "a/a_2", "b/b_1"]


def test_a_sky_class_is_the_index_of_the_video_among_those_of_all_splits_that_are_read(sky_folders: Path):
    found = clips(sky_folders, split="all")
    classes = {sample["id"]: int(sample["class_id"]) for sample in (found[0, 0, i, 0] for i in range(4))}
    assert classes == {"train/a/a_1": 0, "train/a/a_2": 0, "train/b/b_1": 1, "test/c/c_1": 2}


def test_ucf_gives_class_and_caption_and_skips_broken_clips(ucf_folders: Path):
    found = clips(ucf_folders, layout="ucf101", split="all")
    labels = {s["id"]: (int(s["class_id"]), s["caption"]) for s in (found[0, 0, i, 0] for i in range(len(found)))}
    assert labels == {
        "train/v_ApplyEyeMakeup_g01_c01": (0, "apply eye makeup"),
        "train/v_HandStandPushups_g02_c03": (1, "handstand pushups"),
        "test/v_YoYo_g01_c02": (2, "yo yo"),
    }


def test_images_of_all_extensions_count_in_lexicographic_order_and_hidden_files_do_not(tmp_path: Path):
    folder = write_clip(tmp_path / "train/v/c", 1)
    for number, name in enumerate(["z.PNG", "b.bmp", "e.jpeg", "d.JPG", "a.ppm", ".hidden.png", "notes.txt"]):
        Image.new("RGB", (8, 6), (10 * number,) * 3).save(folder / name, format="PNG")
    sample = clips(tmp_path, num_frames=6)[0, 0, 0, 0]
    assert numbers(sample) == [40, 10, 0, 30, 20, 0]  # a b c_00000 d e z


def test_links_that_leave_the_root_are_ignored_and_counted(sky_folders: Path, tmp_path: Path):
    outside = write_clip(tmp_path / "outside/x_1", 9)
    (sky_folders / "train/a/linked").symlink_to(outside)
    (sky_folders / "train/a/inner").symlink_to(sky_folders / "test/c/c_1")
    (sky_folders / "train/b/b_1/z.png").symlink_to(outside / "x_1_00000.png")
    found = clips(sky_folders)
    assert found.ids == ["train/a/a_1", "train/a/a_2", "train/a/inner", "train/b/b_1"]
    assert found.dropped == {"links that leave the root": 2}
    assert numbers(found[0, 0, 2, 0])[0] in (0, 1)
    assert {numbers(found[0, epoch, 3, 0])[-1] for epoch in range(30)} == {4, 5, 6}


# ---- which frames ----


@given(num_frames=st.integers(1, 6), stride=st.integers(1, 4), frames=st.integers(1, 24))
@on_one_folder
def test_a_clip_is_start_plus_stride_times_i_and_every_start_is_drawn(
    tmp_path_factory: pytest.TempPathFactory, num_frames: int, stride: int, frames: int
):
    root = tmp_path_factory.mktemp("clips")
    write_clip(root / "train/v/c", frames, size=(4, 4))
    span = (num_frames - 1) * stride + 1
    if span > frames:
        with pytest.raises(UserError, match=rf"none of the 1 clips .* has the {span} frames.* has {frames}"):
            clips(root, num_frames=num_frames, frame_stride=stride)
        return
    found = clips(root, num_frames=num_frames, frame_stride=stride)
    starts = set()
    for epoch in range(12 * (frames - span + 1)):
        read = numbers(found[0, epoch, 0, 0])
        assert read == [read[0] + stride * i for i in range(num_frames)]
        starts.add(read[0])
    assert starts == set(range(frames - span + 1))


def test_starts_are_uniform(sky_folders: Path):
    found = clips(sky_folders, num_frames=3, frame_stride=2)
    starts = Counter(numbers(found[0, epoch, 1, 0])[0] for epoch in range(1600))
    assert set(starts) == set(range(8))
    assert sum((count - 200) ** 2 / 200 for count in starts.values()) < 24.3  # chi-square, 7 degrees, p = 0.001


@pytest.mark.parametrize("layout", ["sky", "ucf101"])
@pytest.mark.parametrize("split", ["train", "all"])
@given(num_frames=st.integers(1, 5), stride=st.integers(1, 2), step=st.none() | st.integers(1, 7))
@on_one_folder
def test_windows_start_every_step_and_by_default_do_not_overlap(
    sky_folders: Path, ucf_folders: Path, layout: str, split: str, num_frames: int, stride: int, step: int | None
):
    root = sky_folders if layout == "sky" else ucf_folders
    slot = {"layout": layout, "split": split, "num_frames": num_frames, "frame_stride": stride, "clip_step": step}
    found = clips(root, temporal_transform="windows", **slot)
    span, step = (num_frames - 1) * stride + 1, step or num_frames * stride
    read = [numbers(found[0, 0, index, 0]) for index in range(len(found))]
    expected = [
        list(range(start, start + span, stride))
        for clip in found.clips
        for start in range(0, clip.frames - span + 1, step)
    ]
    assert read == expected
    assert found.ids == [f"{found.clips[owner].name}@{start}" for owner, start in found.windows]
    assert len(set(found.ids)) == len(found)


def test_windows_of_a_clip_partition_it_up_to_the_remainder(sky_folders: Path):
    found = clips(sky_folders, num_frames=5, temporal_transform="windows")
    frames = [number for index in (1, 2) for number in numbers(found[0, 0, index, 0])]
    assert found.ids == ["train/a/a_1@0", "train/a/a_2@0", "train/a/a_2@5", "train/b/b_1@0"]
    assert frames == list(range(10))


# ---- pixels ----


@pytest.mark.parametrize("size", [(17, 12), (12, 17), (9, 9), (31, 8), (8, 8)])
def test_center_crop_resize_is_torchvisions_without_antialias(tmp_path: Path, size: tuple[int, int]):
    picture = write_noise(tmp_path / "train/v/c/0.png", size)
    read = clips(tmp_path, num_frames=1, resolution=8)[0, 0, 0, 0]["pixel_values"][:, 0]
    floats = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
    wanted = functional.center_crop(functional.resize(floats, [8], antialias=False), [8, 8])
    assert (read - wanted).abs().max() <= 1.01 / 127.5  # one grey level: the resize is of uint8
    assert (read - wanted).abs().mean() < 0.4 / 127.5


def test_resize_is_to_a_square_and_none_keeps_the_shape(tmp_path: Path):
    picture = write_noise(tmp_path / "train/v/c/0.png", (16, 8))
    floats = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1
    kept = clips(tmp_path, num_frames=1, spatial_transform="none")[0, 0, 0, 0]["pixel_values"]
    assert torch.equal(kept[:, 0], floats)
    square = clips(tmp_path, num_frames=1, spatial_transform="resize", resolution=6)[0, 0, 0, 0]["pixel_values"]
    assert square.shape == (3, 1, 6, 6)
    assert (square[:, 0] - functional.resize(floats, [6, 6], antialias=False)).abs().max() <= 1.01 / 127.5


def test_random_crop_takes_one_place_for_the_whole_clip_and_reaches_all_places(tmp_path: Path):
    for number in range(3):
        picture = write_noise(tmp_path / f"train/v/c/{number}.png", (7, 6))
    found = clips(tmp_path, num_frames=3, resolution=5, spatial_transform="random_crop")
    shutil.copy(tmp_path / "train/v/c/2.png", tmp_path / "train/v/c/0.png")
    places = set()
    for epoch in range(60):
        pixels = torch.round((found[0, epoch, 0, 0]["pixel_values"] + 1) * 127.5).byte().permute(1, 2, 3, 0).numpy()
        hits = [(y, x) for y in range(2) for x in range(3) if (pixels[2] == picture[y : y + 5, x : x + 5]).all()]
        assert (pixels[0] == pixels[2]).all()
        places.update(hits)
    assert places == {(y, x) for y in range(2) for x in range(3)}


def test_pixels_are_float32_and_black_and_white_are_exactly_minus_one_and_one(tmp_path: Path):
    for number, grey in enumerate((0, 255)):
        (tmp_path / "train/v/c").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), grey).save(tmp_path / f"train/v/c/{number}.png")
    pixels = clips(tmp_path, num_frames=2)[0, 0, 0, 0]["pixel_values"]
    assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.float32, (3, 2, 4, 4), True)
    assert pixels[:, 0].unique().tolist() == [-1.0] and pixels[:, 1].unique().tolist() == [1.0]


# ---- bad files ----


def test_a_truncated_jpeg_is_skipped_counted_and_named(tmp_path: Path):
    for clip in ("a", "b"):
        write_clip(tmp_path / f"train/v/{clip}", 5, size=(64, 64), ext=".jpg")
    victim = tmp_path / "train/v/a/a_00003.jpg"
    write_noise(victim, (64, 64))
    victim.write_bytes(victim.read_bytes()[:-300])
    found = clips(tmp_path, resolution=64)
    sample = next(s for s in (found[0, epoch, 0, 0] for epoch in range(100)) if len(s["bad"]) == 1)
    [(name, reason)] = sample["bad"]
    assert (sample["id"], name) == ("train/v/b", "train/v/a/a_00003.jpg")
    assert "truncated" in reason


def test_a_file_that_is_no_image_and_one_of_another_size_are_bad_samples(sky_folders: Path):
    (sky_folders / "train/a/a_1/a_1_00002.png").write_bytes(b"not a picture")
    Image.new("RGB", (9, 9)).save(sky_folders / "train/b/b_1/b_1_00003.png")
    found = clips(sky_folders)
    assert found[0, 0, 0, 0]["bad"][0] == ("train/a/a_1/a_1_00002.png", "not an image")
    name, reason = found[0, 0, 2, 0]["bad"][0]
    assert (name, reason) == ("train/b/b_1/b_1_00003.png", "is 9x9 where the clip's first frame is 8x6")


def test_a_clip_that_changes_under_the_run_is_a_bad_sample(sky_folders: Path):
    found = clips(sky_folders)
    (sky_folders / "train/a/a_1/a_1_00000.png").unlink()
    shutil.rmtree(sky_folders / "train/b/b_1")
    assert found[0, 0, 0, 0]["bad"][0] == ("train/a/a_1", "had 5 frames when the run began and has 4 now")
    name, reason = found[0, 0, 2, 0]["bad"][0]
    assert name == "train/b/b_1" and "No such file" in reason


# ---- the same samples everywhere ----


def loaded(found: FrameClips, workers: int) -> dict[str, Any]:
    """All samples of one epoch, in its order, as the run's loader reads them."""
    keys = [(5, 1, int(index), place) for place, index in enumerate(found.order(5, 1))]
    context = "forkserver" if workers else None
    loader = DataLoader(
        found, sampler=keys, batch_size=2, num_workers=workers, collate_fn=collate, multiprocessing_context=context
    )
    batches = list(loader)
    return {
        "pixels": torch.cat([batch["pixel_values"] for batch in batches]),
        "labels": [(i, p) for batch in batches for i, p in zip(batch["id"], batch["place"], strict=True)],
        "bad": [bad for batch in batches for bad in batch["bad"]],
    }


def test_the_number_of_workers_changes_no_sample(sky_folders: Path):
    (sky_folders / "train/a/a_1/a_1_00002.png").write_bytes(b"not a picture")
    found = clips(sky_folders)
    wanted = loaded(found, 0)
    assert wanted["bad"]
    for workers in (1, 2):
        got = loaded(found, workers)
        assert torch.equal(got["pixels"], wanted["pixels"])
        assert (got["labels"], got["bad"]) == (wanted["labels"], wanted["bad"])


def test_the_place_of_the_root_changes_neither_samples_nor_fingerprint(sky_folders: Path, tmp_path: Path):
    shutil.copytree(sky_folders, tmp_path / "elsewhere/deep/copy")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    here, there = clips(sky_folders), clips(tmp_path / "link/deep/copy")
    assert (here.ids, here.fingerprint) == (there.ids, there.fingerprint)
    assert torch.equal(loaded(here, 0)["pixels"], loaded(there, 0)["pixels"])


def changes_of(root: Path) -> Iterator[Path]:
    """A copy of the data for each kind of change to its content."""
    for kind in ("longer", "renamed", "removed", "new clip", "moved clip"):
        copy = root.parent / kind
        shutil.copytree(root, copy)
        frame = copy / "train/a/a_2/a_2_00003.png"
        if kind == "longer":
            frame.write_bytes(frame.read_bytes() + b"\0")
        elif kind == "renamed":
            frame.rename(frame.with_name("a_2_00003b.png"))
        elif kind == "removed":
            frame.unlink()
        elif kind == "moved clip":
            frame.parent.rename(copy / "train/b/a_2")
        else:
            write_clip(copy / "train/d/d_1", 2)
        yield copy


def test_each_change_of_the_files_changes_the_fingerprint(sky_folders: Path):
    prints = [clips(root).fingerprint for root in (sky_folders, *changes_of(sky_folders))]
    assert len(set(prints)) == 6


def test_two_recipes_on_the_same_files_share_the_fingerprint_and_two_splits_do_not(sky_folders: Path):
    assert clips(sky_folders, num_frames=2).fingerprint == clips(sky_folders, num_frames=9, resolution=8).fingerprint
    assert clips(sky_folders, num_frames=2).fingerprint != clips(sky_folders, num_frames=2, split="test").fingerprint


def test_what_a_worker_receives_is_small(sky_folders: Path):
    for number in range(100):
        write_clip(sky_folders / f"train/many/many_{number:03}", 5, size=(2, 2))
    found = clips(sky_folders)
    found.order(0, 0)
    assert len(pickle.dumps(found)) < 100 * 80 + 2000


# ---- errors that teach ----


@pytest.mark.parametrize(
    ("where", "changes", "words"),
    [
        ("sly", {}, r"sly does not exist \(did you mean 'sky'\?\)\. Expected <root>/<split>/<video>/<clip>/\*\.jpg"),
        ("sky/train/a/a_1/a_1_00000.png", {}, "is a file"),
        ("sky", {"split": "tran"}, r"no folder 'tran' in .*sky. \(did you mean 'train'\?\).*found test, train"),
        ("sky/train", {}, "one level too deep: .*sky has the splits"),
        (".", {}, "one level too shallow: .*sky has a folder 'train'"),
        ("sky/test", {"split": "valid"}, 'no splits: use an empty split.*found c'),
        ("ucf", {}, r"no clips in the layout sky.*found _broken_clips, v_Apply.*layout ucf101 \(--data.layout ucf101\)"),
        ("sky", {"layout": "ucf101"}, r"train has no clips in the layout ucf101.*found a, b\. .*layout sky \(--data"),
        ("sky/train", {"split": "a"}, "1 level too shallow: name a folder further up"),
        (".", {"split": "sky"}, "images lie at test/c/c_1/.*1 level too deep: name a folder further down"),
        ("sky", {"num_frames": 16}, r"none of the 3 clips.*num_frames=16 .*longest, train/a/a_2, has 12"),
        ("sky", {"num_frames": 4, "frame_stride": 4}, "13 frames that num_frames=4 with frame_stride=4 needs"),
        ("sky", {"spatial_transform": "random_crop", "resolution": 7}, r"7x7 .*a_1_00000\.png is 8x6.*center_crop"),
    ],
)  # fmt: skip
def test_a_mistake_about_the_folder_is_explained(
    sky_folders: Path, ucf_folders: Path, tmp_path: Path, where: str, changes: dict[str, Any], words: str
):
    root = tmp_path / where if where != "." else _alone(tmp_path, sky_folders)
    with pytest.raises(UserError, match=words):
        clips(root, **changes)


def _alone(tmp_path: Path, sky_folders: Path) -> Path:
    """A folder that holds nothing but the sky."""
    shutil.move(sky_folders, tmp_path / "outer/sky")
    return tmp_path / "outer"


def test_an_empty_folder_and_a_folder_of_videos_are_told_apart(tmp_path: Path):
    (tmp_path / "train/sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"found sub\. No image files in it"):
        clips(tmp_path)
    (tmp_path / "train/sub/clip.MP4").touch()
    with pytest.raises(UserError, match="holds video files"):
        clips(tmp_path)


def test_a_split_that_links_out_of_the_root_is_refused(sky_folders: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/train").symlink_to(sky_folders / "train")
    with pytest.raises(UserError, match=r"'train' of .*other leads out of it, to .*sky/train"):
        clips(tmp_path / "other")


def test_links_that_emptied_the_set_are_mentioned(sky_folders: Path, tmp_path: Path):
    (tmp_path / "other/train").mkdir(parents=True)
    (tmp_path / "other/train/a").symlink_to(sky_folders / "train/a")
    with pytest.raises(UserError, match=r"1 links that leave the root were ignored"):
        clips(tmp_path / "other")


def test_ucf_without_its_list_or_with_a_wrong_one_is_refused(ucf_folders: Path):
    listed = ucf_folders / "ucfTrainTestlist/classInd.txt"
    text = listed.read_text()
    listed.write_text(text.replace("ApplyEyeMakeup", "ApplyEyeMakeupp"))
    with pytest.raises(UserError, match=r"v_ApplyEyeMakeup_g01_c01: its class .*did you mean 'applyeyemakeupp'"):
        clips(ucf_folders, layout="ucf101")
    listed.write_text("1 ApplyEyeMakeup\n")
    with pytest.raises(UserError, match=r"must list 101 classes.*has 1 lines"):
        clips(ucf_folders, layout="ucf101")
    listed.unlink()
    with pytest.raises(UserError, match=r"classInd\.txt is missing"):
        clips(ucf_folders, layout="ucf101")


def test_an_image_smaller_than_the_crop_later_on_is_a_bad_sample(tmp_path: Path):
    write_clip(tmp_path / "train/v/a", 5, size=(9, 9))
    write_clip(tmp_path / "train/v/b", 5, size=(5, 5))
    found = clips(tmp_path, spatial_transform="random_crop", resolution=8)
    assert ("train/v/b", "has frames of [5, 5], smaller than the crop") in found[0, 0, 1, 0]["bad"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_not_taken_for_an_empty_one(sky_folders: Path):
    (sky_folders / "train/a").chmod(0)
    try:
        with pytest.raises(UserError, match=r"cannot read .*sky/train/a: Permission denied"):
            clips(sky_folders)
    finally:
        (sky_folders / "train/a").chmod(0o755)


def test_the_real_rng_state_is_left_alone(sky_folders: Path):
    torch.manual_seed(0)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    clips(sky_folders)[0, 0, 0, 0]
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpys).all()
