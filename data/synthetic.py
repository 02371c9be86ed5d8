"""A sky that anyone can make: moving clouds on disk, in the layout of Sky Timelapse, for a first run without downloads.

Clouds are periodic noise with amplitude 1/f^a, drifting by a constant sub-pixel step through a window that is smaller
than the field; the sky behind them is a gradient of dawn, noon or dusk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from core.hashing import hash_of
from data.cache import cached

VERSION = 2  # of the pictures: raise it when they change, and the cache makes a new folder
JPEG_QUALITY = 95
SHADED_AT = 3.5  # deviations above the cover where a cloud is as dark as it gets
SPEED = (0.75, 2.0)  # pixels a frame
SLOPE = (2.3, 2.8)  # of the amplitude
SMALLEST, LARGEST = 10.0, 56.0  # pixels a cycle: the noise is flat above, and nothing below
DEFAULT = {"train_videos": 64, "test_videos": 40, "clips_per_video": 4, "frames": 24, "size": 64, "seed": 0}

# zenith, horizon, lit cloud, shaded cloud; linear mixtures of neighbours are the hours between
HOURS = np.array(
    [
        [[58, 66, 118], [232, 168, 150], [246, 214, 202], [138, 120, 146]],  # dawn
        [[38, 96, 178], [158, 196, 228], [250, 250, 252], [166, 178, 196]],  # noon
        [[40, 44, 92], [238, 138, 74], [250, 186, 130], [112, 84, 104]],  # dusk
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Clouds:
    """What a clip is drawn from: one random sky, and how it moves."""

    spectrum: np.ndarray  # (field, field // 2 + 1) complex: the periodic noise
    velocity: tuple[float, float]  # rows and columns a frame
    colours: np.ndarray  # (4, 3) zenith, horizon, lit, shaded
    cover: float  # noise level where clouds begin: low is overcast
    softness: float  # width of a cloud's edge, in deviations of the noise


def render(seed: int, frames: int, size: int) -> np.ndarray:
    """One clip, uint8 (T, size, size, 3): a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    clouds = _draw(rng, _field_size(frames, size))
    density = np.stack([shift(clouds.spectrum, clouds.velocity, t)[:size, :size] for t in range(frames)])
    return _colour(density, clouds)


def _field_size(frames: int, size: int) -> int:
    """A power of two that the window cannot leave: no cloud comes by twice."""
    return 1 << int(np.ceil(np.log2(size + SPEED[1] * frames)))


def _draw(rng: np.random.Generator, field: int) -> Clouds:
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEED)
    return Clouds(
        spectrum=noise_spectrum(rng, field),
        velocity=(speed * np.sin(angle), speed * np.cos(angle)),
        colours=_hour(rng),
        cover=rng.uniform(-0.9, 0.3),
        softness=rng.uniform(1.6, 2.6),
    )


def noise_spectrum(rng: np.random.Generator, field: int) -> np.ndarray:
    """White noise times 1/f^a from LARGEST down to SMALLEST pixels, with deviation 1 (the rfft2 of a real field)."""
    f = np.hypot(*_frequencies(field))
    gain = (f**2 + LARGEST**-2) ** (-rng.uniform(*SLOPE) / 2) * np.exp(-((f * SMALLEST) ** 4))
    gain[0, 0] = 0
    spectrum = np.fft.rfft2(rng.standard_normal((field, field))) * gain
    return spectrum / np.fft.irfft2(spectrum).std()


def _frequencies(field: int) -> tuple[np.ndarray, np.ndarray]:
    """Cycles a pixel along rows (field, 1) and columns (1, field // 2 + 1)."""
    return np.fft.fftfreq(field)[:, None], np.fft.rfftfreq(field)[None, :]


def shift(spectrum: np.ndarray, velocity: tuple[float, float], t: int) -> np.ndarray:
    """The field moved by t * velocity pixels, exactly, by the shift theorem."""
    field = len(spectrum)
    rows, columns = _frequencies(field)
    phase = np.exp(-2j * np.pi * t * (rows * velocity[0] + columns * velocity[1]))
    return np.fft.irfft2(spectrum * phase, s=(field, field))


def _hour(rng: np.random.Generator) -> np.ndarray:
    """(4, 3) colours of a random time of day, with a hue and a brightness of its own."""
    first, second = rng.choice(3, 2, replace=False, p=(0.25, 0.5, 0.25))
    colours = HOURS[first] + rng.uniform(0, 0.35) * (HOURS[second] - HOURS[first])
    tint, brightness = rng.uniform(0.94, 1.06, size=3), rng.uniform(0.88, 1.06)
    return np.clip(colours * tint * brightness, 0, 255)


def _colour(density: np.ndarray, clouds: Clouds) -> np.ndarray:
    """(T, H, W) noise -> (T, H, W, 3) uint8: clouds over a gradient, darker where they are thick."""
    zenith, horizon, lit, shaded = clouds.colours
    down = np.linspace(0, 1, density.shape[1])[:, None, None]  # (H, 1, 1)
    sky = zenith + (horizon - zenith) * down**1.3  # (H, 1, 3)
    alpha = smoothstep((density - clouds.cover) / clouds.softness)[..., None]
    thick = smoothstep((density - clouds.cover) / SHADED_AT)[..., None]
    cloud = lit + (shaded - lit) * 0.8 * thick
    return np.rint(sky + (cloud - sky) * alpha).astype(np.uint8)


def smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def write_sky(
    root: Path,
    *,
    train_videos: int = DEFAULT["train_videos"],
    test_videos: int = DEFAULT["test_videos"],
    clips_per_video: int = DEFAULT["clips_per_video"],
    frames: int = DEFAULT["frames"],
    size: int = DEFAULT["size"],
    seed: int = DEFAULT["seed"],
) -> None:
    """Write `<root>/{train,test}/<video>/<clip>/<clip>_00000.jpg`, the same bytes for the same arguments and libraries.

    Args:
        root: folder to fill; made if missing.
        train_videos: videos of the train split.
        test_videos: videos of the test split.
        clips_per_video: clips of each video.
        frames: frames of each clip.
        size: height and width in pixels.
        seed: another seed is another sky.
    """
    for split, videos in (("train", train_videos), ("test", test_videos)):
        for clip in _clip_names(videos, clips_per_video):
            pictures = render(hash_of("sky", seed, split, clip), frames, size)
            _write_clip(root / split / clip, pictures)


def _clip_names(videos: int, clips_per_video: int) -> Iterator[str]:
    for video in range(videos):
        yield from (f"sky{video:03}/sky{video:03}_{clip}" for clip in range(1, clips_per_video + 1))


def _write_clip(folder: Path, pictures: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{folder.name}_{number:05}.jpg", quality=JPEG_QUALITY)


def sky_root() -> Path:
    """The default sky's folder in the cache, written on first use (about five seconds)."""
    return cached("sky", VERSION, DEFAULT, lambda folder: write_sky(folder, **DEFAULT))


if __name__ == "__main__":
    import tyro

    tyro.cli(write_sky)
