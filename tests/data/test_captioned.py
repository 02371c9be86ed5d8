"""Captioned videos in WebVid's formats: what is found, which frames and captions come out, and what fails aloud."""

import csv
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.loader import Skipped, batches
from core.slots.slot import SlotError, from_json, to_json
from data.captioned import CaptionedClips
from data.samples import BadSample
from data.slots import CaptionedVideos
from tests.data.videos import HEIGHT, KINDS, WIDTH, bars, numbers, ramp, write_video

CAPTIONS = {"a.mp4": "a white cloud", "b.mp4": 'the "second", of\ntwo lines', "deep/c.mp4": ""}
on_one_folder = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 40 frames at 10 a second: a.mp4, b.mp4, deep/c.mp4."""
    root = tmp_path_factory.mktemp("videos")
    for name in CAPTIONS:
        write_video(root / name, 40, options=KINDS["h264.mp4"][2])
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(template, tmp_path / "videos"))


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("name", "contentUrl")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def table(root: Path) -> Path:
    return write_csv(root.parent / "captions.csv", [(caption, name) for name, caption in CAPTIONS.items()])


def clips(root: Path, **changes: Any) -> CaptionedClips:
    slot = {"root": root, "num_frames": 4, "resolution": (HEIGHT, WIDTH), "held_out_share": 0.0, **changes}
    return CaptionedVideos(**slot).build()


def read(dataset: CaptionedClips, epoch: int = 0) -> Iterator[dict[str, Any]]:
    return (dataset[0, epoch, index, index] for index in range(len(dataset)))


def captions(dataset: CaptionedClips) -> dict[str, str]:
    return {sample["id"]: sample["caption"] for sample in read(dataset)}


# ---- formats ----


def test_csv_gives_captions_and_clips(root: Path):
    found = clips(root, annotations=table(root))
    assert captions(found) == CAPTIONS
    sample = found[0, 0, 0, 5]
    assert (sample["pixel_values"].shape, sample["pixel_values"].dtype) == ((3, 4, HEIGHT, WIDTH), torch.float32)
    assert (sample["place"], sample["bad"]) == (5, [])
    assert found.describe()["layout"] == "csv (captions.csv: name, contentUrl)"


def test_json_lines_give_the_same_samples(root: Path):
    lines = [json.dumps({"name": caption, "afs_path": str(root / name)}) for name, caption in CAPTIONS.items()]
    (root.parent / "train_type_data.list").write_text("\n".join(lines))
    found = clips(root, annotations=root.parent / "train_type_data.list")
    assert captions(found) == CAPTIONS
    assert found.describe()["layout"] == "jsonl (train_type_data.list: name, afs_path)"
    other = clips(root, annotations=table(root))
    assert found.fingerprint == other.fingerprint
    for one, same in zip(read(found), read(other), strict=True):
        assert one["id"] == same["id"] and torch.equal(one["pixel_values"], same["pixel_values"])


def test_a_plain_folder_has_sidecars_or_no_captions(root: Path):
    (root / "a.txt").write_text("\ufeffa cloud\n of two lines\n", encoding="utf-8")
    (root / "notes.md").write_text("not a video")
    (root / ".hidden.mp4").write_text("hidden")
    found = clips(root)
    assert captions(found) == {"a.mp4": "a cloud of two lines", "b.mp4": "", "deep/c.mp4": ""}
    assert found.describe()["layout"] == "folder (1 of 3 videos with a caption beside them)"


def test_a_table_in_the_root_is_found_and_the_splits_own_comes_first(root: Path):
    write_csv(root / "everything.csv", [("all", "a.mp4"), ("all", "b.mp4")])
    assert set(captions(clips(root)).values()) == {"all"}
    write_csv(root / "train.csv", [("train", "a.mp4")])
    write_csv(root / "val.csv", [("val", "b.mp4")])
    slot = CaptionedVideos(root=root, held_out_split="val", num_frames=4)
    assert captions(slot.build()) == {"a.mp4": "train"}
    assert captions(slot.held_out().build()) == {"b.mp4": "val"}
    (root / "everything.csv").unlink()
    assert captions(slot.but(split="all").build()) == {"a.mp4": "train", "b.mp4": "val"}


def test_several_tables_of_which_none_is_the_splits_are_an_error_that_names_them(root: Path):
    for name in ("one.csv", "two.jsonl"):
        (root / name).write_text("name,contentUrl\n")
    with pytest.raises(UserError, match=r"several tables \(one\.csv, two\.jsonl\), and not one called train"):
        clips(root)


def test_the_split_fills_the_place_in_the_tables_name(root: Path):
    write_csv(root.parent / "results_2M_train.csv", [("train", "a.mp4")])
    write_csv(root.parent / "results_2M_val.csv", [("val", "b.mp4")])
    slot = CaptionedVideos(
        root=root, annotations=root.parent / "results_2M_{split}.csv", held_out_split="val", num_frames=4
    )
    assert (captions(slot.build()), captions(slot.held_out().build())) == ({"a.mp4": "train"}, {"b.mp4": "val"})


def test_folders_of_the_splits_names_are_the_splits(root: Path):
    (root / "train").mkdir()
    (root / "a.mp4").rename(root / "train/a.mp4")
    (root / "deep").rename(root / "test")
    slot = CaptionedVideos(root=root, num_frames=4)
    assert (list(slot.build().ids), list(slot.held_out().build().ids)) == (["train/a.mp4"], ["test/c.mp4"])
    assert sorted(slot.but(split="all").build().ids) == ["b.mp4", "test/c.mp4", "train/a.mp4"]


@given(count=st.integers(2, 60), share=st.floats(0.01, 0.6))
@on_one_folder
def test_a_table_without_splits_is_parted_by_video(root: Path, count: int, share: float):
    rows = [(f"caption {n}", f"{n % (count // 2 + 1)}.mp4") for n in range(count)]
    write_csv(root / "captions.csv", rows)
    shutil.copy(root / "a.mp4", root / "0.mp4")
    for name in range(count // 2 + 1):
        (root / f"{name}.mp4").touch()
    slot = CaptionedVideos(root=root, held_out_share=share)
    try:
        train, test = slot.build(), slot.held_out().build()
    except UserError as error:
        assert "has no videos" in str(error)
        return
    videos = [{name.partition("#")[0] for name in part.ids} for part in (train, test)]
    assert not videos[0] & videos[1]
    assert len(train) + len(test) == count and len(test) >= 1
    assert sorted([*train.ids, *test.ids]) == sorted(slot.but(split="all").build().ids)


def test_the_synthetic_clouds_are_the_default(monkeypatch: pytest.MonkeyPatch):
    from data import synthetic_captions

    small = {"train_clips": 3, "test_clips": 2, "frames": 6, "size": 32, "seed": 0}
    monkeypatch.setattr(synthetic_captions, "DEFAULT", small)
    slot = CaptionedVideos(num_frames=6, resolution=32)
    assert (len(slot.build()), len(slot.held_out().build())) == (3, 2)
    sample = slot.build()[0, 0, 0, 0]
    assert sample["pixel_values"].shape == (3, 6, 32, 32) and "cloud" in sample["caption"]


# ---- which frames ----


@pytest.mark.parametrize(("num_frames", "stride"), [(1, 3), (4, 1), (4, 4), (6, 6), (20, 2)])
def test_the_stride_is_what_it_says_and_every_start_is_drawn(template: Path, num_frames: int, stride: int):
    """The original computed a strided list and then read consecutive frames from the first quarter of the video."""
    found = clips(template, num_frames=num_frames, frame_stride=stride)
    starts = set()
    for epoch in range(60):
        shown = numbers(found[0, epoch, 0, 0]["pixel_values"])
        assert np.diff(shown).tolist() == [stride] * (num_frames - 1)
        starts.add(shown[0])
    last = 40 - ((num_frames - 1) * stride + 1)
    assert max(starts) > 0.85 * last and len(starts) > min(20, 0.6 * (last + 1))


@pytest.mark.parametrize(
    ("fps", "stride", "steps"), [(5.0, 1, {2}), (5.0, 3, {6}), (20.0, 1, {0, 1}), (7.5, 1, {1, 2})]
)
def test_fps_is_frames_a_second_of_the_clip(root: Path, fps: float, stride: int, steps: set[int]):
    """The files have ten a second."""
    for sample in read(clips(root, fps=fps, frame_stride=stride, num_frames=6)):
        shown = numbers(sample["pixel_values"])
        assert set(np.diff(shown).tolist()) == steps
        assert shown[-1] - shown[0] == pytest.approx(5 * stride * 10 / fps, abs=1)


def test_a_variable_rate_file_is_read_by_its_clock(tmp_path: Path):
    shown = np.cumsum([0] + [50, 50, 50, 850] * 10)[:40]
    write_video(tmp_path / "vfr/v.mkv", 40, milliseconds=shown.tolist())
    found = clips(tmp_path / "vfr", fps=1.0, num_frames=5)
    for epoch in range(20):
        read_now = numbers(found[0, epoch, 0, 0]["pixel_values"])
        assert np.diff(read_now).tolist() == [4, 4, 4, 4]


# ---- pixels ----


@pytest.mark.parametrize("size", [(24, 24), (32, 48), (48, 20), (96, 96)])
@pytest.mark.parametrize("how", ["center_crop_resize", "random_crop_resize"])
def test_the_aspect_ratio_is_kept(tmp_path: Path, size: tuple[int, int], how: str):
    """A ramp's slope, in the clip, is the same along both axes."""
    write_video(tmp_path / "ramps/r.mp4", 6, picture=ramp, size=(96, 128))
    clip = clips(tmp_path / "ramps", resolution=size, spatial_transform=how)[0, 0, 0, 0]["pixel_values"]
    assert clip.shape == (3, 4, *size)
    grey = (clip + 1) * 127.5
    right = float(grey[0, 0].diff(dim=1).mean()) * 128 / 240  # source pixels a pixel of the clip
    down = float(grey[1, 0].diff(dim=0).mean()) * 96 / 240
    assert right == pytest.approx(down, rel=0.12)
    assert down == pytest.approx(1 / max(size[0] / 96, size[1] / 128), rel=0.12)


def test_resize_squashes(tmp_path: Path):
    write_video(tmp_path / "ramps/r.mp4", 6, picture=ramp, size=(96, 128))
    clip = clips(tmp_path / "ramps", resolution=32, spatial_transform="resize")[0, 0, 0, 0]["pixel_values"]
    grey = (clip[:, 0] + 1) * 127.5
    assert grey[0, 16, -1] - grey[0, 16, 0] == pytest.approx(240 * 31 / 32, abs=8)
    assert grey[1, -1, 16] - grey[1, 0, 16] == pytest.approx(240 * 31 / 32, abs=8)


def test_random_crops_lie_anywhere_and_centre_crops_in_the_middle(tmp_path: Path):
    write_video(tmp_path / "ramps/r.mp4", 6, picture=ramp, size=(48, 96))
    places: dict[str, set[int]] = {}
    for how in ("center_crop_resize", "random_crop_resize", "random_crop"):
        found = clips(tmp_path / "ramps", resolution=48, spatial_transform=how)
        lefts = [float(found[0, epoch, 0, 0]["pixel_values"][0, 0, 24, 0] + 1) * 127.5 for epoch in range(40)]
        places[how] = {round(left * 95 / 240) for left in lefts}
    assert len(places["center_crop_resize"]) == 1 and abs(places["center_crop_resize"].pop() - 24) <= 2
    for how in ("random_crop_resize", "random_crop"):
        assert min(places[how]) <= 4 and max(places[how]) >= 43 and len(places[how]) > 15


def test_none_leaves_the_size(root: Path):
    assert clips(root, resolution=8, spatial_transform="none")[0, 0, 0, 0]["pixel_values"].shape[-2:] == (HEIGHT, WIDTH)


def test_black_and_white_are_minus_one_and_one(root: Path):
    values = clips(root, spatial_transform="none")[0, 3, 0, 0]["pixel_values"]
    assert values.min() == -1.0 and values.max() == 1.0 and values.is_contiguous()


@pytest.mark.parametrize(("decoder", "opened"), [("decord", 3), ("pyav", 0)])
def test_the_slot_chooses_the_decoder(root: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, opened: int):
    decord, paths = pytest.importorskip("decord"), []

    class Reader(decord.VideoReader):
        def __init__(self, path: str, **settings: Any):
            paths.append(path)
            super().__init__(path, **settings)

    monkeypatch.setattr(decord, "VideoReader", Reader)
    assert len(list(read(clips(root, decoder=decoder)))) == 3
    assert len(paths) == opened


# ---- the same sample, always ----


def test_workers_and_the_roots_place_change_nothing(root: Path, tmp_path: Path):
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere" / "moved"))
    keys = [[(7, 1, index, index) for index in range(3)]]
    slot = {"spatial_transform": "random_crop_resize", "resolution": 32}
    alone = next(batches(clips(root, annotations=table(root), **slot), keys, workers=0, pin=False))
    for dataset, workers in (
        (clips(root, annotations=table(root), **slot), 2),
        (clips(moved, annotations=table(root), **slot), 0),
    ):
        other = next(batches(dataset, keys, workers=workers, pin=False))
        assert torch.equal(alone["pixel_values"], other["pixel_values"])
        assert (alone["caption"], alone["id"]) == (other["caption"], other["id"])


def test_a_dataset_pickles_small_and_reads_the_same_afterwards(root: Path):
    write_csv(root / "captions.csv", [(f"caption {n}", f"{'a' if n % 2 else 'b'}.mp4") for n in range(5000)])
    found = clips(root)
    sample, pickled = found[0, 0, 4321, 0], pickle.dumps(found)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)[0, 0, 4321, 0]  # noqa: S301
    assert again["id"] == sample["id"] and torch.equal(again["pixel_values"], sample["pixel_values"])


# ---- what fails ----


def test_bad_files_are_replaced_counted_and_named(root: Path, tmp_path: Path):
    (root / "b.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("no video")
    (root / "link.mp4").symlink_to(write_video(tmp_path / "outside/o.mp4", 40))
    write_video(root / "short.mp4", 3)
    names = ["a.mp4", "b.mp4", "text.mp4", "link.mp4", "short.mp4", "gone.mp4"]
    found = clips(root, annotations=write_csv(tmp_path / "t.csv", [("caption", name) for name in names]))
    bad: dict[str, str] = {}
    for epoch in range(5):
        for sample in _readable(found, epoch):
            assert sample["id"] == "a.mp4"
            bad |= dict(sample["bad"])
    assert bad == {
        "b.mp4": "cannot be decoded: invalid data found when processing input",
        "text.mp4": "cannot be decoded: invalid data found when processing input",
        "link.mp4": "is a link that leaves the root",
        "short.mp4": "is too short: it has 3 frames, and a clip covers 4",
        "gone.mp4": "does not exist",
    }


def _readable(found: CaptionedClips, epoch: int) -> Iterator[dict[str, Any]]:
    """Samples whose chain of replacements meets the one good video."""
    for index in range(len(found)):
        try:
            yield found[0, epoch, index, 0]
        except UserError as error:
            assert "9 samples in a row" in str(error)


def test_too_many_bad_files_stop_the_run_by_name(root: Path):
    for name in ("b.mp4", "deep/c.mp4"):
        (root / name).write_bytes(b"broken")
    found, skipped = clips(root, max_bad_share=0.3), Skipped(0.3)
    keys = [[(0, epoch, index, index) for index in range(3)] for epoch in range(8)]
    with pytest.raises(
        UserError, match=r"samples could not be read, more than data\.max_bad_share = 0\.3: .*\.mp4 \(cannot"
    ):
        for batch in batches(found, keys, workers=0, pin=False):
            skipped.count(batch)


def test_a_crop_larger_than_the_frames_is_a_bad_sample(root: Path):
    with pytest.raises(BadSample, match=r"has frames of \[48, 64\], smaller than the crop of \[64, 64\]"):
        clips(root, resolution=64, spatial_transform="random_crop").read(0, np.random.default_rng(0))


def test_a_sidecar_that_leaves_the_root_or_is_no_text_is_a_bad_sample(root: Path, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    (root / "a.txt").symlink_to(tmp_path / "secret.txt")
    (root / "b.txt").write_bytes(b"\xff\xfe\xfa")
    found = clips(root)
    reasons = {}
    for index, name in enumerate(found.ids):
        if name != "deep/c.mp4":
            with pytest.raises(BadSample) as caught:
                found.read(index, np.random.default_rng(0))
            reasons[caught.value.name] = caught.value.reason
    assert reasons["a.txt"] == "is a link that leaves the root"
    assert "cannot be read" in reasons["b.txt"]


def test_links_out_of_a_plain_folder_are_left_out_and_counted(root: Path, tmp_path: Path):
    (root / "link.mp4").symlink_to(write_video(tmp_path / "outside/o.mp4", 5))
    (root / "inner.mp4").symlink_to(root / "a.mp4")
    found = clips(root)
    assert sorted(found.ids) == ["a.mp4", "b.mp4", "deep/c.mp4", "inner.mp4"]
    assert found.dropped == {"links that leave the root (the first: 'link.mp4')": 1}


def test_a_link_to_nowhere_and_a_pipe_are_left_out_and_counted(root: Path):
    (root / "link.mp4").symlink_to("nowhere.mp4")
    assert clips(root).dropped == {"names of videos that are no files (the first: 'link.mp4')": 1}
    os.mkfifo(root / "pipe.mp4")
    found = clips(root)
    assert sorted(found.ids) == ["a.mp4", "b.mp4", "deep/c.mp4"] and set(found.dropped.values()) == {2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: {"root": root.parent / "video"}, r"video does not exist \(did you mean 'videos'\?\)"),
        (lambda root: {"root": root / "a.mp4"}, "a.mp4 is a file; name the folder"),
        (
            lambda root: {"annotations": Path("caption.csv")},
            r"annotations caption\.csv do not exist, neither here nor in",
        ),
        (
            lambda root: {"annotations": write_csv(root.parent / "e.csv", [])},
            "has no rows that can be used; expected csv",
        ),
        (
            lambda root: {"annotations": write_csv(root.parent / "u.csv", [("c", "https://host/a.mp4")])},
            r"1 addresses, not paths.*--data\.path \"\{page_dir\}/\{videoid\}\.mp4\"",
        ),
        (
            lambda root: {"annotations": table(root), "root": root.parent},
            r"none of 3 videos that the table names was found .*They are in .*/videos: name that as the root",
        ),
        (
            lambda root: {"annotations": table(root), "root": root / "deep"},
            r"They are in .*/videos: name that as the root",
        ),
        (lambda root: {"root": _empty(root)}, r"no videos \(\.mp4.* and no table of captions below .*holds nothing"),
        (lambda root: {"layout": "csv"}, "no csv table in"),
        (lambda root: {"annotations": table(root), "layout": "jsonl"}, "no rows that can be used; expected jsonl"),
    ],
)
def test_a_wrong_root_or_table_says_at_once_what_was_expected_and_found(root: Path, make: Any, message: str):
    with pytest.raises(UserError, match=message):
        clips(**{"root": root, **make(root)})


def _empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def test_a_cache_that_cannot_be_written_is_named(root: Path, cache: Path):
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write an index .* name another with REGISTRY_CACHE"):
        clips(root)


# ---- the slot ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 0.0}, "fps"),
        ({"resolution": (64, 0)}, "resolution"),
        ({"held_out_share": 1.5}, "held_out_share"),
        ({"layout": "folder", "annotations": Path("a.csv")}, "annotations"),
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(SlotError, match=message):
        CaptionedVideos(**changes)


@given(st.integers(1, 999) | st.tuples(st.integers(1, 999), st.integers(1, 999)), st.none() | st.floats(0.1, 120))
def test_a_slot_survives_json(resolution: Any, fps: float | None):
    slot = CaptionedVideos(resolution=resolution, fps=fps, annotations=Path("a_{split}.csv"))
    assert from_json(CaptionedVideos, json.loads(json.dumps(to_json(slot))), "data") == slot


def test_bars_can_be_read_after_any_resize():
    assert numbers(np.stack([bars(n, 24, 40) for n in range(256)])) == list(range(256))
