"""Captioned clouds: what a caption says is in its clip, the same for the same arguments, in the layout of WebVid."""

import csv
import subprocess
import sys

import av
import numpy as np
import pytest
import torch

from core.attributes import scores
from core.slots.metric import DIRECTIONS, SPEEDS
from data import synthetic_captions
from data.synthetic_captions import COMBINATIONS, PHRASES, caption, clouds_root, render, told, write_clouds

TINY = {"train_clips": 3, "test_clips": 2, "frames": 4, "size": 32, "seed": 3}


def bytes_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_same_arguments_write_the_same_bytes_and_another_seed_none_of_the_clips(tmp_path):
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 4}}.items():
        write_clouds(tmp_path / name, **{**TINY, **changes})
    a, b, c = (bytes_of(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys()
    clips = [name for name in a if name.endswith(".mp4")]
    assert len(clips) == 5 and all(a[name] != c[name] for name in clips)
    assert len({a[name] for name in clips}) == 5


def test_the_layout_is_webvid_s(tmp_path):
    write_clouds(tmp_path, **TINY)
    with (tmp_path / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "contentUrl"]
    assert [row["contentUrl"] for row in rows] == ["test/cloud00000.mp4", "test/cloud00001.mp4"]
    assert all(decoded(tmp_path / row["contentUrl"]).shape == (4, 32, 32, 3) for row in rows)
    assert "red" in rows[0]["name"] and "slowly" in rows[0]["name"]


def test_a_file_shows_what_was_drawn(tmp_path):
    frames = render(5, told(13), frames=4, size=64)
    synthetic_captions._write_mp4(tmp_path / "clip.mp4", frames)
    error = np.square(decoded(tmp_path / "clip.mp4").astype(float) - frames).mean()
    assert 10 * np.log10(255**2 / error) > 36


def test_all_combinations_come_equally_often_in_every_phrase():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 48
    assert [told(i) for i in range(48, 96)] == COMBINATIONS
    said = {caption(seed, told(7)) for seed in range(100)}
    assert len(said) == len(PHRASES)
    assert all({told(7).colour, told(7).speed} <= set(text.replace(",", "").split()) for text in said)


@pytest.mark.parametrize("index", [0, 3, 5, 14, 23, 38, 47])
@pytest.mark.parametrize("size", [32, 64])
def test_a_cloud_moves_as_its_caption_says_and_never_leaves_the_picture(index, size):
    words = told(index)
    clip = render(100 + index, words, frames=8, size=size).astype(float)
    mass = np.abs(clip - np.median(clip, axis=(1, 2), keepdims=True)).sum(-1)  # (T, H, W)
    mass = np.where(mass > 60, mass, 0.0)
    edge = np.concatenate([mass[:, 0], mass[:, -1], mass[:, :, 0], mass[:, :, -1]], axis=1)
    assert edge.max() == 0 and mass.sum((1, 2)).min() > 0.75 * mass.sum((1, 2)).max()
    rows, columns = np.indices((size, size))
    centre = np.stack([(mass * axis).sum((1, 2)) / mass.sum((1, 2)) for axis in (rows, columns)], 1) / size
    step = (centre[-1] - centre[0]) / 7
    low, high = SPEEDS[words.speed]
    assert 0.97 * low < np.hypot(*step) < 1.03 * high
    assert step @ DIRECTIONS[words.direction] > 0.98 * np.hypot(*step)


def test_the_metric_reads_every_attribute_of_the_files_that_are_written(tmp_path):
    write_clouds(tmp_path, train_clips=0, test_clips=96)
    with (tmp_path / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clips = np.stack([decoded(tmp_path / row["contentUrl"]) for row in rows])
    video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 127.5 - 1
    found = scores(video, [row["name"] for row in rows])
    assert found.keys() == {"colour_score", "direction_score", "speed_score"}
    assert min(found.values()) >= 0.98


def test_the_default_set_is_written_once(monkeypatch, tmp_path):
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path))
    monkeypatch.setattr(synthetic_captions, "DEFAULT", TINY)
    root = clouds_root()
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*.mp4")}
    assert clouds_root() == root and len(stamps) == 5
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.mp4")} == stamps


def test_the_command_writes_the_clips_anywhere(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    subprocess.run(
        [sys.executable, "-m", "data.synthetic_captions", "--root", str(tmp_path / "cli"), *flags], check=True
    )
    write_clouds(tmp_path / "call", **TINY)
    assert bytes_of(tmp_path / "cli") == bytes_of(tmp_path / "call")
