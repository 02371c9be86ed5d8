"""Frames out of video files: which ones, at what size, and with which decoder.

decord is quick, but three of its habits make wrong clips without a word (0.6.0, measured): after a seek it counts
frames from the key frame, so that a group of pictures that is open gives other frames than were asked for; it resizes a
picture before it turns it upright; and it cannot read AV1. So PyAV reads the packets first (no decoding, a few
milliseconds): their time stamps choose the frames, and their order says whether decord can be trusted with them.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation

try:
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "256")  # its own 10240 is minutes on a broken file
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except ImportError:  # it has no wheel for this platform: PyAV decodes everything
    decord = None

Size = Callable[[int, int], tuple[int, int]]
"""From the height and width of a picture as it is shown to those that are wanted."""

DECORD_FORMATS = frozenset(("mov", "mp4", "matroska", "webm", "flv"))  # it seeks wrongly in avi, mpegts and mpeg
DECORD_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4"))
FORMATS = "mov,matroska,flv,avi,mpegts,mpeg,mpegvideo,ogg,asf,gif,m4v,h264,hevc,ivf,obu,apng,nut,mxf,wtv,rm,dv"
UPRIGHT = struct.pack(">5i", 1 << 16, 0, 0, 0, 1 << 16)  # the first five of the nine numbers of a track's matrix
CONTAINED = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
"""A playlist (HLS, concat) names other files and addresses, so what is called .mp4 must be a video."""


class Unreadable(Exception):
    """A video that cannot be decoded as asked; the message is the reason, without the file's name."""


class TooShort(Unreadable):
    """A video that has fewer frames, or seconds, than a clip."""


class Packets(NamedTuple):
    """What a file's packets say. `stamps`: (frames,) int64 presentation stamps in order, in units of `unit` seconds;
    `keys`: those of key frames. `stamps` is just 0, 1, … where the file has none (`stamped` is False).
    """

    stamps: np.ndarray
    keys: np.ndarray
    unit: Fraction
    stamped: bool
    height: int
    width: int
    pixel_aspect: Fraction
    exact_seek: bool

    def times(self) -> np.ndarray:
        """(frames,) float64 seconds from the first frame on."""
        return (self.stamps - self.stamps[0]) * float(self.unit)


def scan(path: Path) -> Packets:
    """Read a file's packets without decoding them. Raises Unreadable."""
    try:
        with av.open(str(path), options=CONTAINED) as container:
            packets = _packets(container)
        turned = packets.exact_seek and _turned(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from None
    return packets._replace(exact_seek=False) if turned else packets


def _turned(path: Path) -> bool:
    """Whether an mp4 or mov says that a track is to be turned or mirrored (PyAV tells only after decoding a frame)."""
    header = _header(path)
    places = [match.end() for match in re.finditer(b"tkhd(?=[\0\1]\0\0)", header)]
    matrices = (header[place + (52 if header[place] else 40) :][: len(UPRIGHT)] for place in places)  # versions 1 and 0
    return any(matrix != UPRIGHT for matrix in matrices)


def _header(path: Path) -> bytes:
    """The `moov` box of an mp4 or mov file; empty where there is none."""
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            size, name = int.from_bytes(head[:4], "big"), head[4:8]
            if size == 1:  # the size is in the eight bytes after the name
                size = int.from_bytes(head[8:], "big")
            if name == b"moov":
                file.seek(8 - len(head), os.SEEK_CUR)
                return file.read(min(size - 8, 1 << 28))
            if size < 8:  # to the end of the file, or no such file at all
                return b""
            file.seek(size - len(head), os.SEEK_CUR)
    return b""


def _packets(container: Any) -> Packets:
    stream = container.streams.best("video")
    if stream is None:
        raise Unreadable("has no video stream")
    rows = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
    if len(rows) < stream.frames:
        raise Unreadable(f"is cut short: {len(rows)} of its {stream.frames} frames are there")
    first = next((place for place, row in enumerate(rows) if row[1]), None)
    if first is None:
        raise Unreadable("has no key frame")
    stamped = all(row[0] is not None for row in rows)
    if stamped:
        shown = [row for row in rows[first:] if not row[2] and row[0] >= rows[first][0]]
        stamps = np.array(sorted({row[0] for row in shown}), np.int64)
        keys = np.array(sorted(row[0] for row in shown if row[1]), np.int64)
    else:
        stamps, keys = np.arange(len(rows) - first), np.zeros(1, np.int64)
    kind = stream.codec_context
    if not (kind.width and kind.height and len(stamps)):
        raise Unreadable("has no pictures")
    return Packets(
        stamps=stamps,
        keys=keys,
        unit=stream.time_base if stamped else 1 / (stream.average_rate or Fraction(25)),
        stamped=stamped,
        height=kind.height,
        width=kind.width,
        pixel_aspect=stream.sample_aspect_ratio or Fraction(1),
        exact_seek=stamped
        and len(stamps) == len(rows)
        and _closed(rows)
        and not DECORD_FORMATS.isdisjoint(container.format.name.split(","))
        and kind.name in DECORD_CODECS,
    )


def _closed(rows: list[tuple[int, bool, bool]]) -> bool:
    """Whether every group of pictures is closed: nothing that is decoded after a key frame is shown before it."""
    latest_key = rows[0][0]
    for stamp, key, _ in rows:
        latest_key = max(latest_key, stamp) if key else latest_key
        if stamp < latest_key:
            return False
    return True


# ---- which frames ---------------------------------------------------------------------------------------------------


def choose(
    times: np.ndarray, count: int, stride: int, fps: float | None, rng: np.random.Generator, *, stretch: bool = False
) -> np.ndarray:
    """(count,) indices of a clip's frames, from a start that is drawn uniformly among those that leave room.

    fps None: every `stride`-th frame as the file has them. Otherwise the clip's clock ticks `fps` times a second, the
    clip has every `stride`-th tick, and a tick shows the frame that a player would show then: frames repeat where the
    file is slower. Raises Unreadable when the video is too short, unless `stretch`: then its whole length is spread
    over the clip, at a rate of its own.
    """
    try:
        return _with_room(times, count, stride, fps, rng)
    except TooShort:
        if not stretch:
            raise
        return _spread(times, count, fps)


def _spread(times: np.ndarray, count: int, fps: float | None) -> np.ndarray:
    """From the first frame to the last: evenly by number, cut to whole ones (AnimateDiff sheet §4.1), or by clock."""
    if fps is None:
        return np.linspace(0, len(times) - 1, count, dtype=np.int64)
    return np.searchsorted(times, np.linspace(0.0, times[-1], count) + _early(times, fps), side="right") - 1


def _early(times: np.ndarray, fps: float) -> float:
    """Seconds by which a frame may come too late: time stamps are rounded, in Matroska to a millisecond."""
    return min(_between(times), 1 / fps) / 4


def _between(times: np.ndarray) -> float:
    """Seconds from frame to frame."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def _with_room(times: np.ndarray, count: int, stride: int, fps: float | None, rng: np.random.Generator) -> np.ndarray:
    if fps is None:
        steps = stride * np.arange(count)
        return _draw(len(times) - int(steps[-1]), len(times), steps[-1] + 1, rng) + steps
    between, early = _between(times), _early(times, fps)
    ticks = np.arange(count) * stride / fps
    starts = int(np.searchsorted(times, times[-1] + between - early - ticks[-1], side="left"))
    if count == 1:
        starts = len(times)
    start = _draw(starts, float(times[-1] + between), float(ticks[-1]), rng)
    return np.searchsorted(times, times[start] + ticks + early, side="right") - 1


def _draw(starts: int, has: float, needs: float, rng: np.random.Generator) -> int:
    if starts < 1:
        unit = "frames" if isinstance(has, int) else "s"
        raise TooShort(f"is too short: it has {has:.4g} {unit}, and a clip covers {needs:.4g}")
    return int(rng.integers(0, starts))


# ---- decoding -------------------------------------------------------------------------------------------------------


def decode(path: Path, packets: Packets, indices: np.ndarray, size: Size, *, strict: bool = False) -> np.ndarray:
    """Frames of a video: (len(indices), h, w, 3) uint8, upright and of the size that `size` makes of theirs.

    decord where its seeking is exact, otherwise PyAV (`strict`: always PyAV, which also tells frames that are damaged).
    The reader is closed before this returns: memory does not grow. Raises Unreadable.
    """
    if decord is not None and packets.exact_seek and not strict:
        frames = _by_decord(path, packets, indices, size)
        if frames is not None:
            return frames
    return _by_pyav(path, packets, indices, size)


def shown_size(height: int, width: int, pixel_aspect: Fraction, size: Size) -> tuple[int, int]:
    """`size` of the picture as it is shown: pixels need not be square."""
    return size(height, max(1, round(width * pixel_aspect)))


def _by_decord(path: Path, packets: Packets, indices: np.ndarray, size: Size) -> np.ndarray | None:
    """None where decord gives up, or what it gives is not what was asked for: the picture is turned, frames lack."""
    height, width = shown_size(packets.height, packets.width, packets.pixel_aspect, size)
    reader = None
    try:
        reader = decord.VideoReader(str(path), width=width, height=height, num_threads=1)
        if len(reader) != len(packets.stamps):
            return None
        frames = reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, AssertionError, IndexError):
        return None
    finally:
        del reader
    return frames if frames.shape == (len(indices), height, width, 3) else None


def _by_pyav(path: Path, packets: Packets, indices: np.ndarray, size: Size) -> np.ndarray:
    """From the key frame before the first wanted frame; from the file's start where that misses one."""
    wanted = packets.stamps[indices]
    try:
        found = _collect(path, packets, wanted, size, from_key=packets.stamped)
        if found is None:
            found = _collect(path, packets, wanted, size, from_key=False)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from None
    if found is None:
        raise Unreadable("lacks frames that its packets promise")
    return np.stack([found[stamp] for stamp in wanted.tolist()])


def _collect(
    path: Path, packets: Packets, wanted: np.ndarray, size: Size, *, from_key: bool
) -> dict[int, np.ndarray] | None:
    """The wanted frames by stamp, or None when one did not come out of the decoder."""
    needed = set(wanted.tolist())
    found: dict[int, np.ndarray] = {}
    with av.open(str(path), options=CONTAINED) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        if from_key:
            key = packets.keys[max(0, np.searchsorted(packets.keys, wanted.min(), side="right") - 1)]
            container.seek(int(key), stream=stream)
        for stamp, frame in _stamped(container.decode(stream), packets.stamped):
            if stamp in needed:
                found[stamp] = _picture(frame, packets.pixel_aspect, size)
                if len(found) == len(needed):
                    return found
    return None


def _stamped(frames: Iterator[Any], stamped: bool) -> Iterator[tuple[int, Any]]:
    for number, frame in enumerate(frames):
        yield (frame.pts if stamped else number), frame


def _picture(frame: Any, pixel_aspect: Fraction, size: Size) -> np.ndarray:
    """(h, w, 3) uint8, upright."""
    if frame.is_corrupt:
        raise Unreadable(f"is damaged at {frame.time or 0:.2f} s")
    turns = round((frame.rotation or 0) / 90) % 4  # quarter turns against the clock that make it upright
    wide = round(frame.width * pixel_aspect)
    height, width = size(wide, frame.height) if turns % 2 else size(frame.height, wide)
    stored = {"height": width, "width": height} if turns % 2 else {"height": height, "width": width}
    picture = frame.reformat(format="rgb24", interpolation=Interpolation.BILINEAR, **stored).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, turns))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    text = getattr(error, "strerror", None) or str(error)
    return f"cannot be decoded: {text[:1].lower()}{text[1:]}"
