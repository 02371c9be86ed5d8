"""Real video files: every frame shows its number as eight bars, black or white."""

import contextlib
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH = 48, 64
X264 = "keyint=8:min-keyint=8:scenecut=0:b-adapt=0:bframes=2"
CLOSED = {"x264-params": f"{X264}:open-gop=0"}
OPEN = {"x264-params": f"{X264}:open-gop=1"}
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("mp4", "libx264", CLOSED),
    "h264-open.mp4": ("mp4", "libx264", OPEN),
    "h264.mkv": ("mkv", "libx264", CLOSED),
    "h264-open.mkv": ("mkv", "libx264", OPEN),
    "h264.ts": ("ts", "libx264", CLOSED),
    "hevc-open.mp4": ("mp4", "libx265", {"x265-params": "keyint=8:log-level=none:pools=1"}),
    "mpeg4.avi": ("avi", "mpeg4", {"bf": "2", "g": "8"}),
    "vp9.webm": ("webm", "libvpx-vp9", {"g": "8"}),
    "av1.mp4": ("mp4", "libsvtav1", {"g": "8", "preset": "12"}),
}
"""Name -> container, codec and options; key frames every eight frames, so that seeking is put to the test."""


def bars(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8: bit b of the number is bar b, from the left."""
    bits = (number >> np.arange(8)) & 1
    return np.broadcast_to((bits * 255).astype(np.uint8).repeat(width // 8)[None, :, None], (height, width, 3)).copy()


def ramp(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8 in which red grows to the right and green downwards, 0 to 240."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 240, width)[None, :]
    picture[..., 1] = np.linspace(0, 240, height)[:, None]
    return picture


def numbers(frames: Any) -> list[int]:
    """The numbers in frames of (T, h, w, 3) uint8 or (3, T, h, w) in [-1, 1], whatever their size."""
    frames = np.asarray(frames)
    grey = frames[..., 1].astype(float) if frames.dtype == np.uint8 else (frames[1] + 1) * 127.5
    middles = ((np.arange(8) + 0.5) * grey.shape[2] / 8).astype(int)
    bits = grey[:, grey.shape[1] // 2, middles] > 128  # (T, 8)
    return (bits << np.arange(8)).sum(1).tolist()


def write_video(
    path: Path,
    frames: int = 40,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rate: int = 10,
    milliseconds: Sequence[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    picture: Callable[[int, int, int], np.ndarray] = bars,
    pixel_aspect: Fraction | None = None,
    rotation: int = 0,
) -> Path:
    """A video of `frames` frames; `milliseconds`: when each is shown, otherwise `rate` a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size))
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@contextlib.contextmanager
def _quiet():
    """SVT-AV1 writes its settings to the standard error, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def resident() -> float:
    """Megabytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
