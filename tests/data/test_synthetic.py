"""The synthetic sky: moving clouds in the real layout, the same for the same arguments, written once."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import cache, synthetic
from data.slots import FrameFolders

TINY = {"train_videos": 2, "test_videos": 1, "clips_per_video": 2, "frames": 3, "size": 16, "seed": 3}


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def tiny_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, and a default set that takes no time."""
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(synthetic, "DEFAULT", TINY)
    return tmp_path / "cache"


def test_the_same_arguments_write_the_same_bytes_and_another_seed_none_of_them(tmp_path: Path):
    for name, changes in {"a": {}, "b": {}, "c": {"seed": 4}}.items():
        synthetic.write_sky(tmp_path / name, **{**TINY, **changes})
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and not set(a.values()) & set(c.values())
    assert len(set(a.values())) == len(a) == 3 * 2 * 3


def test_the_layout_is_that_of_sky_timelapse(tmp_path: Path):
    synthetic.write_sky(tmp_path, **TINY)
    assert "train/sky001/sky001_2/sky001_2_00002.jpg" in files(tmp_path)
    found = FrameFolders(root=tmp_path, split="all", num_frames=3, resolution=16).build()
    assert (len(found), found.dropped) == (6, {})


def test_the_default_fills_the_twins_needs():
    sizes = synthetic.DEFAULT
    assert sizes["train_videos"] * sizes["clips_per_video"] == 256
    assert sizes["test_videos"] * sizes["clips_per_video"] == 160
    assert (sizes["frames"], sizes["size"]) == (24, 64)


@pytest.mark.parametrize("seed", range(6))
def test_clouds_drift_by_a_constant_sub_pixel_step(seed: int):
    rng = np.random.default_rng(seed)
    clouds = synthetic._draw(rng, 128)
    assert 0.75 <= np.hypot(*clouds.velocity) <= 2.0
    field = np.stack([synthetic.shift(clouds.spectrum, clouds.velocity, t) for t in range(24)])
    cross = np.fft.fft2(field[0]) * np.fft.fft2(field[20]).conj()
    peak = np.unravel_index(np.fft.ifft2(cross).real.argmax(), (128, 128))
    moved = (-np.array(peak) + 64) % 128 - 64
    assert np.abs(moved - 20 * np.array(clouds.velocity)).max() <= 1.0


def test_a_whole_pixel_step_moves_the_field_exactly():
    spectrum = synthetic.noise_spectrum(np.random.default_rng(0), 64)
    still = synthetic.shift(spectrum, (1.0, -2.0), 0)
    moved = synthetic.shift(spectrum, (1.0, -2.0), 3)
    assert np.allclose(moved, np.roll(still, (3, -6), (0, 1)), atol=1e-12)


def test_clouds_have_no_detail_below_eight_pixels_and_a_slope_in_range():
    slopes = []
    for seed in range(8):
        power = np.abs(synthetic.noise_spectrum(np.random.default_rng(seed), 256)) ** 2
        f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :])
        assert power[f > 1 / 4].sum() < 1e-4 * power.sum()
        low, high = (np.log(power[(f > c * 0.9) & (f < c * 1.1)].mean()) for c in (1 / 30, 1 / 12))
        slopes.append((low - high) / np.log(30 / 12) / 2)  # of the amplitude; a little flatter above 56 pixels
    assert min(slopes) > 1.7 and max(slopes) < 3.0


def test_directions_and_hours_of_clips_vary():
    clips = [synthetic._draw(np.random.default_rng(seed), 32) for seed in range(40)]
    quadrants = {(clip.velocity[0] > 0, clip.velocity[1] > 0) for clip in clips}
    redness = [clip.colours[1, 0] - clip.colours[1, 2] for clip in clips]  # of the horizon
    assert len(quadrants) == 4
    assert min(redness) < -20 and max(redness) > 60


def test_the_default_sky_is_written_once_and_leaves_nothing_half_done(tiny_default: Path):
    first = synthetic.sky_root()
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")}
    assert synthetic.sky_root() == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.jpg")} == stamps
    assert [path.name for path in tiny_default.iterdir()] == [first.name]


def test_several_at_once_get_the_same_whole_sky(tiny_default: Path):
    counts = set()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(synthetic.sky_root) for _ in range(4)]
        while not all(future.done() for future in asked):
            counts |= {len(files(path)) for path in tiny_default.glob("sky-*")}
    roots = [future.result() for future in asked]
    assert len(set(roots)) == 1
    assert counts <= {18}
    assert len(files(roots[0])) == 18
    assert [path.name for path in tiny_default.iterdir()] == [roots[0].name]


def test_a_loser_of_the_race_takes_the_winners_sky(tiny_default: Path):
    won = synthetic.sky_root()
    before = files(won)
    cache.write_once(won, lambda half: synthetic.write_sky(half, **TINY))
    assert files(won) == before
    assert len(list(tiny_default.iterdir())) == 1


def test_a_write_that_fails_leaves_nothing(tiny_default: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synthetic, "JPEG_QUALITY", "no number")
    with pytest.raises(Exception, match=r"no number|quality"):
        synthetic.sky_root()
    assert list(tiny_default.iterdir()) == []


def test_other_parameters_and_another_version_have_a_folder_of_their_own(
    tiny_default: Path, monkeypatch: pytest.MonkeyPatch
):
    names = {synthetic.sky_root().name}
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    names.add(synthetic.sky_root().name)
    monkeypatch.setattr(synthetic, "DEFAULT", {**TINY, "seed": 9})
    names.add(synthetic.sky_root().name)
    assert len(names) == 3


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"REGISTRY_CACHE": "{tmp}/own", "XDG_CACHE_HOME": "{tmp}/xdg"}, "own"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg"}, "xdg/video-experiment-registry"),
        ({"HOME": "{tmp}/home"}, "home/.cache/video-experiment-registry"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("REGISTRY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    monkeypatch.setattr(synthetic, "DEFAULT", TINY)
    assert synthetic.sky_root().parent == tmp_path / folder


def test_a_slot_without_a_root_reads_the_synthetic_sky(tiny_default: Path):
    slot: dict[str, Any] = {"num_frames": 3, "resolution": 16}
    found, held_out = FrameFolders(**slot).build(), FrameFolders(**slot).held_out().build()
    assert (len(found), len(held_out)) == (4, 2)
    assert found[0, 0, 0, 0]["pixel_values"].shape == (3, 3, 16, 16)


def test_the_command_writes_a_sky_anywhere(tmp_path: Path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    subprocess.run([sys.executable, "-m", "data.synthetic", "--root", str(tmp_path / "cli"), *flags], check=True)
    synthetic.write_sky(tmp_path / "call", **TINY)
    assert files(tmp_path / "cli") == files(tmp_path / "call")
