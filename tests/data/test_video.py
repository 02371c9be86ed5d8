"""Frames out of real files: the right ones, upright, at the size that was asked for, or a reason why not."""

import gc
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import video
from data.video import Unreadable, choose, decode, scan
from tests.data.videos import HEIGHT, KINDS, WIDTH, numbers, ramp, resident, write_video

FRAMES = 40


def as_stored(height: int, width: int) -> tuple[int, int]:
    return height, width


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video of every kind, 40 frames at 10 a second."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        name: write_video(folder / f"{name.split('.')[0]}.{ending}", FRAMES, codec=codec, options=options)
        for name, (ending, codec, options) in KINDS.items()
    }


# ---- the right frames ----


@pytest.mark.parametrize("strict", [False, True], ids=["decord", "pyav"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_clip_has_the_frames_that_were_asked_for(files: dict[str, Path], kind: str, strict: bool):
    packets = scan(files[kind])
    assert len(packets.stamps) == FRAMES
    assert packets.times() == pytest.approx(np.arange(FRAMES) / 10, abs=1e-3)
    for start in range(0, FRAMES - 9, 3):
        indices = start + 3 * np.arange(4)
        frames = decode(files[kind], packets, indices, as_stored, strict=strict)
        assert (frames.shape, frames.dtype) == ((4, HEIGHT, WIDTH, 3), np.uint8)
        assert numbers(frames) == indices.tolist()


def test_frames_come_in_the_order_asked_for_and_may_repeat(files: dict[str, Path]):
    indices = np.array([7, 7, 8, 3])
    for kind in ("h264.mp4", "av1.mp4"):
        assert numbers(decode(files[kind], scan(files[kind]), indices, as_stored)) == [7, 7, 8, 3]


def test_decord_is_trusted_only_where_its_seeking_is_exact(files: dict[str, Path]):
    exact = {kind for kind, path in files.items() if scan(path).exact_seek}
    assert exact == {"h264.mp4", "h264.mkv", "vp9.webm"}


@pytest.mark.parametrize("kind", ["h264-open.mp4", "hevc-open.mp4", "mpeg4.avi", "h264.ts"])
def test_alone_decord_gives_other_frames_without_a_word(files: dict[str, Path], kind: str):
    """Why packets are read first. When this fails, decord has been mended, and `exact_seek` may allow more."""
    decord = pytest.importorskip("decord")
    wrong = 0
    for start in range(8, FRAMES - 4):
        reader = decord.VideoReader(str(files[kind]), num_threads=1)
        wrong += numbers(reader.get_batch(range(start, start + 4)).asnumpy()) != list(range(start, start + 4))
    assert wrong > 5


def test_without_decord_pyav_gives_the_same_clip(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("decord")
    path, indices = files["h264.mp4"], np.arange(10, 20)
    ours = decode(path, scan(path), indices, lambda height, width: (24, 32))
    monkeypatch.setattr(video, "decord", None)
    other = decode(path, scan(path), indices, lambda height, width: (24, 32))
    assert np.abs(ours.astype(int) - other).max() <= 2


def test_decord_decodes_at_the_size_that_is_wanted(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    decord, opened = pytest.importorskip("decord"), []

    class Reader(decord.VideoReader):
        def __init__(self, *args, **settings):
            opened.append(settings)
            super().__init__(*args, **settings)

    monkeypatch.setattr(video.decord, "VideoReader", Reader)
    path = files["h264.mp4"]
    assert decode(path, scan(path), np.arange(3), lambda height, width: (height // 2, width // 4)).shape[1:3] == (
        24,
        16,
    )
    assert opened == [{"width": 16, "height": 24, "num_threads": 1}]


# ---- upright and in proportion ----


@pytest.mark.parametrize("ending", ["mp4", "mov"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_picture_that_is_to_be_turned_is_turned_before_it_is_resized(tmp_path: Path, rotation: int, ending: str):
    path = write_video(tmp_path / f"turned.{ending}", 10, picture=ramp, rotation=rotation)
    packets = scan(path)
    assert not packets.exact_seek
    seen = []

    def half(height: int, width: int) -> tuple[int, int]:
        seen.append((height, width))
        return height // 2, width // 2

    frames = decode(path, packets, np.arange(2), half)
    upright = np.rot90(ramp(0), rotation // 90)
    assert set(seen) == {upright.shape[:2]}
    assert frames.shape[1:3] == (upright.shape[0] // 2, upright.shape[1] // 2)
    assert np.abs(frames[0, 4:-4, 4:-4, :2].astype(int) - upright[::2, ::2][4:-4, 4:-4, :2]).mean() < 8


def test_a_mirrored_track_is_not_left_to_decord(tmp_path: Path):
    path = write_video(tmp_path / "mirrored.mp4", 5)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    assert content[place : place + 4] == struct.pack(">i", 1 << 16)
    content[place + 16 : place + 20] = struct.pack(">i", -1 << 16)
    path.write_bytes(content)
    assert not scan(path).exact_seek


@pytest.mark.parametrize("strict", [False, True], ids=["decord", "pyav"])
def test_pixels_that_are_not_square_count_as_wide_as_they_are_shown(tmp_path: Path, strict: bool):
    path = write_video(tmp_path / "wide.mp4", 5, pixel_aspect=Fraction(4, 3))
    shown = []
    decode(path, scan(path), np.arange(2), lambda h, w: shown.append((h, w)) or (24, 32), strict=strict)
    assert set(shown) == {(HEIGHT, round(WIDTH * 4 / 3))}


# ---- which frames ----


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32))
def test_without_fps_a_clip_is_every_stride_th_frame_from_any_start_that_leaves_room(
    frames: int, count: int, stride: int, seed: int
):
    times = np.cumsum(np.random.default_rng(seed).uniform(0.01, 1, frames))
    span = (count - 1) * stride + 1
    rng = np.random.default_rng(seed)
    if span > frames:
        with pytest.raises(Unreadable, match=rf"too short: it has {frames} frames, and a clip covers {span}"):
            choose(times, count, stride, None, rng)
        return
    starts = {int(choose(times, count, stride, None, rng)[0]) for _ in range(40 * (frames - span + 1))}
    assert starts == set(range(frames - span + 1))
    chosen = choose(times, count, stride, None, rng)
    assert (np.diff(chosen) == stride).all()


@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([5.0, 7.5, 10.0, 15.0, 30.0, 60.0]),
    st.integers(0, 99),
)
def test_with_fps_a_tick_shows_the_frame_that_a_player_would_show(count: int, stride: int, fps: float, seed: int):
    rng = np.random.default_rng(seed)
    times = np.round(np.cumsum(rng.choice([0.02, 0.04, 0.3], 200)), 3)
    times -= times[0]
    chosen = choose(times, count, stride, fps, rng)
    ticks = times[chosen[0]] + np.arange(count) * stride / fps
    shown = np.searchsorted(times, ticks + 0.005, side="right") - 1  # a quarter of the usual 20 or 40 ms, at most
    late = np.searchsorted(times, ticks + 0.01, side="right") - 1
    assert ((chosen == shown) | (chosen == late)).all()
    assert ticks[-1] < times[-1] + 0.3


@given(
    st.integers(2, 12), st.integers(1, 4), st.sampled_from([1, 2, 3, 5]), st.sampled_from([23.976, 25.0, 29.97, 60.0])
)
def test_a_rate_that_divides_the_files_own_takes_every_nth_frame_though_stamps_are_rounded(
    count: int, stride: int, divisor: int, rate: float
):
    times = np.round(np.arange(400) / rate, 3)  # Matroska's milliseconds
    for seed in range(5):
        chosen = choose(times, count, stride, rate / divisor, np.random.default_rng(seed))
        assert np.diff(chosen).tolist() == [stride * divisor] * (count - 1)


@pytest.mark.parametrize(("fps", "frames"), [(None, 30), (10.0, 30), (5.0, 59), (20.0, 15)])
def test_a_video_of_just_the_length_has_one_start_and_one_frame_less_is_too_short(fps: float | None, frames: int):
    rng, times = np.random.default_rng(0), np.arange(frames) / 10
    assert {int(choose(times, 30, 1, fps, rng)[0]) for _ in range(20)} == {0}
    with pytest.raises(Unreadable, match="too short"):
        choose(times[:-1], 30, 1, fps, rng)


def test_a_slower_file_repeats_its_frames():
    assert choose(np.arange(5) / 10, 10, 1, 20.0, np.random.default_rng(0)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_of_a_variable_rate_file_the_frames_on_the_clock_are_read(tmp_path: Path, ending: str):
    """Frames at 0, 50, 100, … ms, but every fifth stays for a second."""
    shown = np.cumsum([0] + [1000 if n % 5 == 4 else 50 for n in range(29)])
    path = write_video(tmp_path / f"vfr.{ending}", 30, milliseconds=shown.tolist(), options={"bf": "2"})
    packets = scan(path)
    assert packets.times() == pytest.approx(shown / 1000, abs=2e-3)
    chosen = choose(packets.times(), 4, 1, 2.0, np.random.default_rng(3))
    expected = [np.flatnonzero(shown <= shown[chosen[0]] + 500 * tick + 5).max() for tick in range(4)]
    assert numbers(decode(path, packets, chosen, as_stored)) == expected


# ---- files that fail ----


def test_files_that_are_no_videos_say_what_they_are(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    reasons = {
        "empty.mp4": "invalid data",
        "text.mp4": "invalid data",
        "folder.mp4": "director",
        "none.mp4": "does not exist",
    }
    for name, reason in reasons.items():
        with pytest.raises(Unreadable, match=reason):
            scan(tmp_path / name)


def test_a_file_with_sound_alone_has_no_video_stream(tmp_path: Path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(Unreadable, match="no video stream"):
        scan(tmp_path / "sound.mp4")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_file_that_was_cut_short_says_how_much_is_there(tmp_path: Path, share: float):
    path = write_video(tmp_path / "cut.mp4", 40, container_options={"movflags": "faststart"}, picture=noise)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(Unreadable, match=r"is cut short: \d+ of its 40 frames are there"):
        scan(path)


def test_a_file_whose_end_with_the_header_is_gone_cannot_be_decoded(tmp_path: Path):
    path = write_video(tmp_path / "cut.mp4", 40)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Unreadable, match="invalid data"):
        scan(path)


def test_a_damaged_file_is_refused_by_pyav_though_decord_may_return_frames(tmp_path: Path):
    path = write_video(tmp_path / "hole.mp4", 40, picture=noise)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    for place in np.random.default_rng(0).integers(start + len(content) // 4, start + len(content) // 2, 60):
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=r"damaged|invalid data"):
        decode(path, scan(path), np.arange(40), as_stored, strict=True)


def test_a_playlist_that_names_another_file_is_not_followed(tmp_path: Path):
    secret = write_video(tmp_path / "outside/secret.ts", 20, options=KINDS["h264.ts"][2])
    lists = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {secret}\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(Unreadable):
            scan(tmp_path / name)


@pytest.mark.parametrize(("kind", "skipped"), [("h264.mp4", 3), ("hevc-open.mp4", 4)])
def test_frames_that_need_what_was_cut_off_do_not_count(
    files: dict[str, Path], tmp_path: Path, kind: str, skipped: int
):
    """Cut at a packet: what comes before the first key frame, or is shown before it, cannot be decoded."""
    with av.open(str(files[kind])) as source, av.open(str(tmp_path / "late.mkv"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            if number >= skipped:
                packet.stream = copy
                target.mux(packet)
    packets = scan(tmp_path / "late.mkv")
    assert not packets.exact_seek
    frames = decode(tmp_path / "late.mkv", packets, np.arange(len(packets.stamps)), as_stored)
    found = numbers(frames)
    assert found == list(range(found[0], 40)) and found[0] >= 8


def noise(number: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- memory ----


def grown(path: Path, clips: int, strict: bool) -> float:
    """Megabytes that the process has grown by over many clips, after some to warm up."""
    rng, before = np.random.default_rng(0), 0.0
    for number in range(clips + 30):
        if number == 30:
            gc.collect()
            before = resident()
        packets = scan(path)
        decode(path, packets, choose(packets.times(), 8, 2, None, rng), lambda h, w: (256, 256), strict=strict)
    gc.collect()
    return resident() - before


@pytest.mark.parametrize("strict", [False, True], ids=["decord", "pyav"])
def test_memory_does_not_grow_over_the_clips(files: dict[str, Path], strict: bool):
    assert grown(files["h264.mp4"], 150, strict) < 16


@pytest.mark.claims
@pytest.mark.parametrize("strict", [False, True], ids=["decord", "pyav"])
def test_memory_is_flat_over_ten_thousand_clips(files: dict[str, Path], strict: bool):
    megabytes = grown(files["h264.mp4"], 10_000, strict)
    print(f"\n10,000 clips by {'pyav' if strict else 'decord'}: grown by {megabytes:.1f} MB")
    assert megabytes < 16
