"""Small real datasets on disk: every frame is a picture whose grey value is its number in the clip."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteClip = Callable[..., Path]
UCF_LIST = ["ApplyEyeMakeup", "HandstandPushups", "YoYo"] + [f"Other{number:02}" for number in range(98)]


def write_clip(folder: Path, frames: int, *, size: tuple[int, int] = (8, 6), ext: str = ".png") -> Path:
    """`frames` pictures of `size` (width, height); frame t is grey t."""
    folder.mkdir(parents=True)
    for number in range(frames):
        Image.new("RGB", size, (number,) * 3).save(folder / f"{folder.name}_{number:05}{ext}")
    return folder


def write_noise(path: Path, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """One picture of noise, returned as it is read back: (H, W, 3) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def sky_folders(tmp_path: Path) -> Path:
    """train: a/a_1 (5 frames), a/a_2 (12), b/b_1 (7); test: c/c_1 (6)."""
    for clip, frames in {"train/a/a_1": 5, "train/a/a_2": 12, "train/b/b_1": 7, "test/c/c_1": 6}.items():
        write_clip(tmp_path / "sky" / clip, frames)
    return tmp_path / "sky"


@pytest.fixture
def ucf_folders(tmp_path: Path) -> Path:
    """train: two classes and a folder of broken clips; test: one class."""
    root = tmp_path / "ucf"
    for clip in ("train/v_ApplyEyeMakeup_g01_c01", "train/v_HandStandPushups_g02_c03", "train/_broken_clips"):
        write_clip(root / clip, 10)
    write_clip(root / "test/v_YoYo_g01_c02", 10)
    (root / "ucfTrainTestlist").mkdir()
    rows = [f"{number} {name}" for number, name in enumerate(UCF_LIST, 1)]
    (root / "ucfTrainTestlist/classInd.txt").write_text("\r\n".join(rows) + "\r\n")
    return root
