"""Options of captioned clips: short videos, mirrored clips, a part of a table, rows without a file; and `data check`."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import registry
from core.build import other_data
from core.errors import UserError
from core.slots.slot import SlotError, from_json, to_json
from data.captioned import CaptionedClips, speaks_of_sides
from data.samples import BadSample
from data.slots import CaptionedVideos
from data.video import TooShort, choose
from tests.data.test_captioned import write_csv
from tests.data.videos import HEIGHT, WIDTH, numbers, write_video

NO_CHANCE = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 40, 10 and 1 frames at 10 a second."""
    root = tmp_path_factory.mktemp("videos")
    for name, frames in {"long.mp4": 40, "ten.mp4": 10, "one.mp4": 1}.items():
        write_video(root / name, frames)
    return root


def clips(root: Path, **changes: Any) -> CaptionedClips:
    slot = {"root": root, "num_frames": 4, "resolution": (HEIGHT, WIDTH), "held_out_share": 0.0, **changes}
    return CaptionedVideos(**slot).build()


def of(dataset: CaptionedClips, name: str, epoch: int = 0) -> dict[str, Any]:
    return dataset[0, epoch, list(dataset.ids).index(name), 0]


# ---- short videos ----


@pytest.mark.parametrize(
    ("frames", "shown"),
    [
        (61, list(range(0, 61, 4))),
        (60, [0, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59]),
        (40, [0, 2, 5, 7, 10, 13, 15, 18, 20, 23, 26, 28, 31, 33, 36, 39]),
        (16, list(range(16))),
        (10, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]),
        (1, [0] * 16),
    ],
)
def test_stretching_gives_the_frames_of_the_original(frames: int, shown: list[int]):
    """16 frames, every fourth: what AnimateDiff's own data set gives for videos of these lengths."""
    times = np.arange(frames) / 25
    assert choose(times, 16, 4, None, NO_CHANCE, stretch=True).tolist() == shown
    if frames < 61:
        with pytest.raises(TooShort, match=rf"too short: it has {frames} frames, and a clip covers 61"):
            choose(times, 16, 4, None, NO_CHANCE)


@given(st.integers(1, 60), st.integers(1, 20), st.sampled_from([None, 5.0, 24.0]), st.integers(0, 9))
def test_a_stretched_clip_goes_through_the_whole_video(frames: int, count: int, fps: float | None, seed: int):
    gaps = np.random.default_rng(seed).integers(20, 90, frames - 1) / 1000
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    shown = choose(times, count, 1000, fps, NO_CHANCE, stretch=True)
    assert len(shown) == count and (np.diff(shown) >= 0).all() and shown[0] >= 0 and shown[-1] < frames
    if count > 1:
        assert (shown[0], shown[-1]) == (0, frames - 1)


def test_by_the_clock_a_stretched_clip_is_even_in_time():
    times = np.array([0.0, 0.1, 0.2, 0.3, 1.2])
    assert choose(times, 5, 1, 2.0, NO_CHANCE, stretch=True).tolist() == [0, 3, 3, 3, 4]


def test_a_short_file_is_rejected_by_name_or_stretched(template: Path):
    found = clips(template, num_frames=16, frame_stride=2)
    with pytest.raises(BadSample, match=r"ten.mp4: is too short: it has 10 frames, and a clip covers 31"):
        found.read(list(found.ids).index("ten.mp4"), NO_CHANCE)
    assert {name for name, _ in of(found, "one.mp4")["bad"]} <= {"one.mp4", "ten.mp4"}
    stretched = clips(template, num_frames=16, frame_stride=2, short_clips="stretch")
    assert numbers(of(stretched, "ten.mp4")["pixel_values"]) == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]
    assert numbers(of(stretched, "one.mp4")["pixel_values"]) == [0] * 16
    for epoch in range(5):  # a video that is long enough is read as before
        one, other = (of(each, "long.mp4", epoch)["pixel_values"] for each in (found, stretched))
        assert torch.equal(one, other) and np.diff(numbers(one)).tolist() == [2] * 15


# ---- mirrored clips ----


@pytest.fixture
def told(template: Path, tmp_path: Path) -> Path:
    """The long video under two captions, one of which speaks of a side."""
    root = tmp_path / "told"
    root.mkdir()
    for name, caption in {"plain.mp4": "a cloud drifts up", "sided.mp4": "a cloud drifts LEFT"}.items():
        shutil.copy(template / "long.mp4", root / name)
        (root / name).with_suffix(".txt").write_text(caption)
    return root


def test_a_clip_is_mirrored_as_a_whole_and_nothing_else_of_it_changes(told: Path):
    how = {"spatial_transform": "random_crop_resize", "resolution": 32}
    plain, mirrored, all_of_it = (
        clips(told, **how, **more)
        for more in ({}, {"horizontal_flip": 1.0}, {"horizontal_flip": 1.0, "flip_sided": True})
    )
    for epoch in range(4):
        for name, turned in (("plain.mp4", True), ("sided.mp4", False)):
            seen = of(plain, name, epoch)["pixel_values"]
            assert not torch.equal(seen, seen.flip(-1))
            expected = seen.flip(-1) if turned else seen
            assert torch.equal(of(mirrored, name, epoch)["pixel_values"], expected)
            assert torch.equal(of(all_of_it, name, epoch)["pixel_values"], seen.flip(-1))


def test_the_decision_belongs_to_seed_epoch_and_id(told: Path):
    plain, half = clips(told), clips(told, horizontal_flip=0.5)
    again = pickle.loads(pickle.dumps(half))  # noqa: S301  as a worker gets it
    turned = []
    for epoch in range(16):
        seen, maybe = (of(each, "plain.mp4", epoch)["pixel_values"] for each in (plain, half))
        turned.append(torch.equal(maybe, seen.flip(-1)))
        assert turned[-1] or torch.equal(maybe, seen)
        assert torch.equal(maybe, of(again, "plain.mp4", epoch)["pixel_values"])
    assert 2 < sum(turned) < 14


def test_held_out_clips_are_neither_mirrored_nor_fewer(told: Path):
    slot = CaptionedVideos(root=told, horizontal_flip=0.5, max_samples=1).held_out()
    assert (slot.horizontal_flip, slot.max_samples, slot.split) == (0.0, None, "test")


@pytest.mark.parametrize(
    ("caption", "sided"),
    [
        ("a car turns left", True),
        ("Right-hand traffic", True),
        ("leftwards, slowly", True),
        ("the rightmost house", True),
        ("a wheel turns counter-clockwise", True),
        ("an anticlockwise swirl", True),
        ("bright lights", False),
        ("leftovers on a plate", False),
        ("copyrighted", False),
        ("", False),
    ],
)
def test_words_of_sides(caption: str, sided: bool):
    assert speaks_of_sides(caption) is sided


# ---- a part of a table ----


@pytest.fixture
def many(template: Path, tmp_path: Path) -> Path:
    """A table of 300 rows with 200 files in two folders; every third row has no file. Returns the root."""
    root = tmp_path / "many"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    names = [f"{'ab'[n % 2]}/{n}.mp4" for n in range(300)]
    for number, name in enumerate(names):
        if number % 3:
            (root / name).hardlink_to(template / "ten.mp4")
    write_csv(root / "train.csv", [(f"caption {n}", name) for n, name in enumerate(names)])
    return root


def numbers_of(dataset: CaptionedClips) -> list[int]:
    return [int(Path(name).stem) for name in dataset.ids]


def test_rows_without_a_file_are_left_out_counted_and_named(many: Path, tmp_path: Path):
    (many / "a/away.mp4").symlink_to(tmp_path / "away.mp4")
    shutil.copy(many / "b/1.mp4", tmp_path / "away.mp4")
    (many / "a/near.mp4").symlink_to(many / "b/1.mp4")
    rows = [("link out", "a/away.mp4"), ("link in", "a/near.mp4"), ("a folder", "a"), ("no folder", "c/1.mp4")]
    rows += [("twice", "b/1.mp4"), ("another", "b/1.mp4"), ("gone", "b/3.mp4"), ("odd", "b//5.mp4")]
    write_csv(many / "odd.csv", rows)
    found = clips(many, annotations=Path("odd.csv"), missing="leave_out")
    assert sorted(found.ids) == sorted(["a/near.mp4", "b/1.mp4", "b/1.mp4#1", "b//5.mp4"])
    (said,) = found.dropped.items()
    assert said[0].startswith("rows whose file is not there (the first: '") and said[1] == 4
    assert {found[0, 0, n, 0]["id"] for n in range(4)} == set(found.ids)
    assert len(clips(many, annotations=Path("odd.csv"))) == 8  # without being asked, nothing is looked for

    whole = clips(many, missing="leave_out")
    assert sorted(numbers_of(whole)) == [n for n in range(300) if n % 3] and sum(whole.dropped.values()) == 100
    assert np.array_equal(whole.id_hashes(), clips(many).id_hashes()[np.isin(clips(many).ids, whole.ids)])


def test_a_folder_without_any_of_the_files_is_a_wrong_root(many: Path):
    with pytest.raises(UserError, match=r"none of 24 videos .* They are in .*/many: name that as the root"):
        clips(many / "a", annotations=many / "train.csv", missing="leave_out")


@pytest.mark.parametrize("subset", ["random", "head"])
@pytest.mark.parametrize("count", [1, 7, 199, 200, 1000])
def test_as_many_samples_as_were_asked_for(many: Path, subset: str, count: int):
    found = clips(many, missing="leave_out", max_samples=count, subset=subset)
    assert len(found) == len(set(found.ids)) == len(found.order(0, 0)) == min(count, 200)
    assert all((many / name).is_file() for name in found.ids)
    assert found.describe()["max_samples"] == f"{min(count, 200)} of 200 rows, {subset}"
    assert np.array_equal(found.id_hashes(), [h for h in clips(many).id_hashes() if h in found.id_hashes()])


def test_the_head_is_the_first_rows_whose_files_are_there(many: Path):
    found = clips(many, missing="leave_out", max_samples=5, subset="head")
    assert sorted(numbers_of(found)) == [1, 2, 4, 5, 7]
    assert sorted(numbers_of(clips(many, max_samples=5, subset="head"))) == [0, 1, 2, 3, 4]


def test_a_random_subset_is_the_tables_and_the_seeds(many: Path, tmp_path: Path):
    def ids(root: Path = many, **changes: Any) -> set[str]:
        return set(clips(root, max_samples=40, **changes).ids)

    moved = Path(shutil.copytree(many, tmp_path / "elsewhere", copy_function=shutil.copy))
    lines = (moved / "train.csv").read_text().splitlines()
    (moved / "train.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert ids() == ids(moved) and ids(subset="head") != ids(moved, subset="head")
    assert ids() != ids(subset_seed=1) == ids(moved, subset_seed=1)
    assert ids() < set(clips(many, max_samples=80).ids)
    chosen = numbers_of(clips(many, max_samples=40))
    assert min(chosen) < 60 and max(chosen) > 240  # it is no head
    one, other = clips(many, max_samples=40), clips(moved, max_samples=40)
    assert one.fingerprint == other.fingerprint != clips(many, max_samples=41).fingerprint
    assert one.fingerprint != clips(many).fingerprint
    again = pickle.loads(pickle.dumps(one))  # noqa: S301  as a worker gets it
    assert list(again.ids) == list(one.ids) and again[0, 0, 3, 0]["id"] == one[0, 0, 3, 0]["id"]


def test_ranks_that_found_other_files_do_not_train_together():
    same = [(200, "a"), (8, "b")]
    assert other_data([same, same]) is None
    assert "rank 2 has other data than rank 0: 199 and 200 samples" in str(
        other_data([same, same, [(199, "c"), (8, "b")]])
    )
    assert "rank 1 has other data" in str(other_data([same, [(200, "a"), (8, "d")]]))


# ---- the slot, and the verb ----


@pytest.mark.parametrize("changes", [{"max_samples": 0}, {"horizontal_flip": 1.5}])
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any]):
    with pytest.raises(SlotError, match=next(iter(changes))):
        CaptionedVideos(**changes)


def test_a_slot_from_before_these_fields_reads_as_it_did():
    value = json.loads(json.dumps(to_json(CaptionedVideos(num_frames=8))))
    before = {name: v for name, v in value.items() if name not in CaptionedVideos.since}
    assert from_json(CaptionedVideos, before, "data") == CaptionedVideos(num_frames=8) and len(before) < len(value)


@pytest.fixture
def mixed(template: Path, tmp_path: Path) -> Iterator[Path]:
    """A table of nine rows: long videos, one that is short, one without a file, one that is no video; held out: one."""
    root = tmp_path / "mixed"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.mp4").hardlink_to(template / "long.mp4")
    shutil.copy(template / "ten.mp4", root / "short.mp4")
    (root / "text.mp4").write_text("no video")
    rows = [("turns left", "0.mp4"), ("", "1.mp4"), *((f"cloud {n}", f"{n}.mp4") for n in (2, 3, 4, 5))]
    write_csv(root / "train.csv", [*rows, ("short", "short.mp4"), ("text", "text.mp4"), ("gone", "gone.mp4")])
    write_csv(root / "test.csv", [("held out", "0.mp4")])
    return root


def test_data_check_counts_what_is_left_out_short_and_broken(mixed: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "check", "lvdm-text2video-tiny", "--data-root", str(mixed), "--resolution", "32"]
    assert registry.main([*words, "--num-frames", "16"]) == 1
    said = capsys.readouterr().out
    assert "lvdm-text2video-tiny, training: 9 samples" in said and "lvdm-text2video-tiny, held out: 1 samples" in said
    assert "layout: csv (train.csv: name, contentUrl)" in said
    assert "read: 9, bad: 3 (33.3%; a run stops above 5.0%)" in said and "read: 1, bad: 0 (0.0%" in said
    assert "1 is too short, the first: short.mp4: is too short: it has 10 frames, and a clip covers 16" in said
    assert "1 does not exist, the first: gone.mp4" in said and "1 cannot be decoded, the first: text.mp4" in said
    assert "captions: 1 empty, 1 speak of sides" in said
    more = ["--data.missing", "leave_out", "--data.short-clips", "stretch", "--data.max-bad-share", "0.2"]
    assert registry.main([*words, "--num-frames", "16", *more]) == 0
    said = capsys.readouterr().out
    assert "8 samples" in said and "dropped: rows whose file is not there (the first: 'gone.mp4'): 1" in said
    assert "read: 8, bad: 1 (12.5%" in said and "too short" not in said
    assert registry.main([*words, "--samples", "2"]) in (0, 1) and "read: 2, " in capsys.readouterr().out
