"""Clips as files: mp4, gif, and contact sheets."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor


def to_uint8(video: Tensor) -> np.ndarray:
    """(N, 3, T, H, W) in [-1, 1] → (N, T, H, W, 3) uint8, rounded."""
    frames = ((video.detach().float().cpu().clamp(-1, 1) + 1.0) * 127.5).round().byte()
    return rearrange(frames, "n c t h w -> n t h w c").numpy()


def sheet(clips: np.ndarray, columns: int = 8, gap: int = 2) -> Image.Image:
    """A row a clip, `columns` frames evenly spread in time. `clips` (N, T, H, W, 3) uint8."""
    n, t, h, w, _ = clips.shape
    chosen = np.linspace(0, t - 1, min(columns, t)).round().astype(int)
    page = np.full((n * (h + gap) - gap, len(chosen) * (w + gap) - gap, 3), 255, np.uint8)
    for row in range(n):
        for column, frame in enumerate(chosen):
            y, x = row * (h + gap), column * (w + gap)
            page[y : y + h, x : x + w] = clips[row, frame]
    return Image.fromarray(page)


def overview(clips: np.ndarray) -> Image.Image:
    """The sheet of clips; pictures (clips of one frame) side by side. `clips` (N, T, H, W, 3) uint8."""
    return sheet(clips) if clips.shape[1] > 1 else Image.fromarray(enlarged(tiled(clips))[0])


def four_frames(clips: np.ndarray) -> Image.Image:
    """Four frames in a square: of one clip, or two of each of two; of pictures the one that each has. `clips` (1 or 2,
    T, H, W, 3) uint8.
    """
    t = clips.shape[1]
    chosen = np.linspace(0, t - 1, 4 // len(clips) if t > 1 else 1).round().astype(int)
    frames = clips[:, chosen].reshape(-1, 1, *clips.shape[2:])  # (4 or fewer, 1, H, W, 3)
    return Image.fromarray(enlarged(tiled(frames))[0])


def tiled(clips: np.ndarray, gap: int = 2) -> np.ndarray:
    """All clips side by side in one, (T, H', W', 3), as square as possible, white between them."""
    n, t, h, w, _ = clips.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    page = np.full((t, rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i in range(n):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        page[:, y : y + h, x : x + w] = clips[i]
    return page


def enlarged(frames: np.ndarray, least: int = 256) -> np.ndarray:
    """(T, H, W, 3) repeated by a whole factor until the shorter side has `least` pixels: tiny clips are hard to see."""
    factor = max(1, -(-least // min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264, yuv420p, CRF 10 as the original; odd sizes lose their last row or column. `frames` (T, H, W, 3) uint8."""
    h, w = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        for frame in frames[:, :h, :w]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: Path, frames: np.ndarray, fps: int) -> None:
    """An animated gif that loops. `frames` (T, H, W, 3) uint8."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
