"""Frames and folders from anywhere: each ends in a sample, in a bad sample that is counted, or in one line."""

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import UserError
from data.samples import BadSample
from data.slots import FrameFolders
from tests.data.conftest import UCF_LIST, write_clip
from tests.fuzz.hostile import bounded, changed, keeping, kept, outcome, untouched

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def encoded(form, image=NOISE, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "described"
PICTURES = {
    ".jpg": [encoded("JPEG"), encoded("JPEG", exif=EXIF), encoded("JPEG", NOISE.convert("CMYK"), progressive=True)],
    ".png": [
        encoded("PNG"),
        encoded("PNG", NOISE.convert("P"), transparency=bytes(9)),
        encoded("PNG", NOISE.convert("I;16")),
    ],
    ".ppm": [encoded("PPM"), b"P3 2 2 255 1 2 3 4 5 6 7 8 9 1 2 3"],
    ".bmp": [encoded("BMP"), encoded("BMP", NOISE.convert("1"))],
}


def slot(root, **fields):
    return FrameFolders(root=root, num_frames=2, resolution=8, **fields)


def read_clip(ending, content):
    """The first sample of a folder of three clips, of which one has this frame."""
    with tempfile.TemporaryDirectory() as around, keeping(f"frames{ending}", content):
        root = Path(around) / "sky"
        (root / "train/v/a").mkdir(parents=True)
        (root / f"train/v/a/1{ending}").write_bytes(content)
        (root / f"train/v/a/2{ending}").write_bytes(content)
        with untouched(Path(around)):
            found = outcome(lambda: slot(root).build())
            return found if isinstance(found, UserError) else outcome(lambda: found.read(0, np.random.default_rng(0)))


@pytest.mark.parametrize("ending", PICTURES)
def test_the_pictures_that_are_changed_below_are_read(ending):
    for content in PICTURES[ending]:
        assert read_clip(ending, content)["pixel_values"].shape == (3, 2, 8, 8)


@pytest.mark.parametrize("ending", PICTURES)
@bounded(60)
@given(data=st.data())
def test_a_changed_picture_is_a_sample_or_a_bad_sample(ending, data):
    read_clip(ending, data.draw(changed(PICTURES[ending])))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"BM"]
)
@pytest.mark.parametrize("ending", PICTURES)
def test_what_is_no_picture_is_a_bad_sample(ending, content):
    assert isinstance(read_clip(ending, content), BadSample)


def test_a_picture_of_another_kind_is_not_handed_to_a_reader_that_runs_programs():
    """Pillow would start Ghostscript for this one, whatever the file is called."""
    found = read_clip(".jpg", encoded("EPS"))
    assert isinstance(found, BadSample) and found.reason == "not an image"


@pytest.mark.parametrize("ending", PICTURES)
def test_a_picture_that_failed_once_is_a_sample_or_a_bad_sample(ending):
    for path in kept(f"frames{ending}"):
        read_clip(ending, path.read_bytes())


# ------------------------------------------------------------------------------------------------- decompression bombs


def png_of_zeros(width, height, rows=None):
    """A PNG that says it is so large; with `rows` of them in it, a thousandth of their size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    deflate = zlib.compressobj(9)
    lines = b"".join(deflate.compress(bytes(1 + 3 * width)) for _ in range(height if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines + deflate.flush()) + chunk(b"IEND", b"")


BOMBS = {
    "a jpeg that says 65500 x 65500": (".jpg", lambda: _resized(encoded("JPEG"), 65500, 65500)),
    "a png of 2 ** 31 columns": (".png", lambda: png_of_zeros(2**31 - 1, 2**31 - 1, rows=0)),
    "a png of 9000 x 9000": (".png", lambda: png_of_zeros(9000, 9000)),
    "a ppm that says 10 ** 5 x 10 ** 5": (".ppm", lambda: b"P6 100000 100000 255\n" + bytes(300)),
    "a bmp that says 40000 x 40000": (".bmp", lambda: _bmp_sized(encoded("BMP"), 40_000, 40_000)),
    "a png with a text of a gigabyte": (".png", lambda: _with_text(encoded("PNG"))),
}


def _resized(jpeg, width, height):
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def _bmp_sized(bmp, width, height):
    return bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]


def _with_text(png):
    content = b"Comment\0\0" + zlib.compress(bytes(2**30 // 8), 9) * 8
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    end = png.index(b"IDAT") - 4
    return png[:end] + chunk + png[end:]


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def try_bombs(folder):
    """What became of each, and by how many megabytes this process grew at most. In a process of its own."""
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    before = peak_mb()
    found = {path.stem: type(read_clip(path.suffix, content)).__name__ for path, content in files.items()}
    print(json.dumps([found, peak_mb() - before]))


def test_a_bomb_is_a_bad_sample_and_takes_no_memory_worth_naming(tmp_path):
    for name, (ending, make) in BOMBS.items():
        (tmp_path / f"{name}{ending}").write_bytes(make())
    code = f"from tests.fuzz.test_frames import *; try_bombs(Path({str(tmp_path)!r}))"
    done = in_a_process_of_its_own(code)
    assert done.returncode == 0, done.stderr[-2000:]
    found, grown = json.loads(done.stdout)
    assert found == dict.fromkeys(BOMBS, "BadSample") and grown < 150


def in_a_process_of_its_own(code, *before, home="/tmp"):
    return subprocess.run(
        [*before, sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(home)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_frames_that_are_too_many_for_their_size_are_a_bad_sample_before_any_is_decoded(tmp_path):
    (tmp_path / "train/v/a").mkdir(parents=True)
    for number in range(16):
        (tmp_path / f"train/v/a/{number:02}.png").write_bytes(png_of_zeros(5000, 5000, rows=0))
    with pytest.raises(BadSample, match="is 5000x5000: more than 16,777,216 pixels are not read"):
        FrameFolders(root=tmp_path, num_frames=16).build().read(0, np.random.default_rng(0))


# -------------------------------------------------------------------------------------------------- folders and names

NAMES = st.one_of(
    st.sampled_from(["a", "train", "..a", "a\nb", "\x1b[2Jcleared", "a.jpg", "-rf", "~", "$(touch proof)", "CON", " "]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=12).map(lambda raw: os.fsdecode(raw.replace(b"/", b"").replace(b"\0", b""))),
).filter(lambda name: name not in ("", ".", "..") and _can_be_a_name(name))  # fmt: skip


def _can_be_a_name(name):
    try:
        return len(os.fsencode(name)) < 200
    except UnicodeEncodeError:
        return False


@st.composite
def trees(draw):
    """A folder: names with a picture, junk, a link, a pipe, or a folder in it."""
    leaf = st.sampled_from(["picture", "picture", "junk", "out", "up", "loop", "gone", "pipe"])
    return draw(st.recursive(leaf, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12))


def grow(path, tree, outside):
    if isinstance(tree, dict):
        path.mkdir(exist_ok=True)
        for name, below in tree.items():
            grow(path / name, below, outside)
        return
    picture = path.with_name(f"{path.name}.png")
    with contextlib.suppress(FileExistsError):  # two names may be one with an ending
        {
            "picture": lambda: picture.write_bytes(PICTURES[".png"][0]),
            "junk": lambda: picture.write_bytes(b"junk"),
            "out": lambda: picture.symlink_to(outside / "1.png"),
            "up": lambda: path.symlink_to("../.."),
            "loop": lambda: picture.symlink_to(picture),
            "gone": lambda: picture.symlink_to("nowhere.png"),
            "pipe": lambda: os.mkfifo(picture),
        }[tree]()


@bounded(150)
@given(tree=trees(), layout=st.sampled_from(["sky", "ucf101"]), split=st.sampled_from(["train", ""]))
def test_any_folder_is_a_dataset_or_refused_in_a_line(tree, layout, split):
    with tempfile.TemporaryDirectory() as around:
        root, outside = Path(around) / "root", write_clip(Path(around) / "outside", 1)
        root.mkdir()
        grow(root / "train", {"v": {"c": tree}, "w": tree}, outside)
        with untouched(Path(around)):
            found = outcome(lambda: slot(root, layout=layout, split=split).build())
            for index in range(0 if isinstance(found, UserError) else len(found)):
                sample = outcome(lambda index=index: found[0, 0, index, 0])
                assert isinstance(sample, UserError) or sample["pixel_values"].shape == (3, 2, 8, 8)


@bounded(100)
@given(data=st.data())
def test_any_list_of_classes_is_read_or_refused_in_a_line(data):
    whole = "\n".join(f"{number} {name}" for number, name in enumerate(UCF_LIST, 1)).encode()
    odd = st.sampled_from([b"9" * 5000, b"0", b"-1", b"\xff", "²".encode(), b"2" * 30, b"\0", b" ", b"\n" * 200_000])
    lines = st.builds(lambda at, new: whole[:at] + new + whole[at + 1 :], st.integers(0, 40), odd)
    content = data.draw(st.one_of(changed([whole]), lines))
    with tempfile.TemporaryDirectory() as around, keeping("classes", content):
        read_classes(Path(around), content)


def read_classes(root, content):
    write_clip(root / "train/v_ApplyEyeMakeup_g01_c01", 2)
    (root / "ucfTrainTestlist").mkdir()
    (root / "ucfTrainTestlist/classInd.txt").write_bytes(content)
    found = outcome(lambda: slot(root, layout="ucf101").build())
    if not isinstance(found, UserError):
        assert 0 <= int(found.read(0, np.random.default_rng(0))["class_id"]) < 101


def test_a_list_of_classes_that_failed_once_is_read_or_refused_in_a_line(tmp_path):
    for path in kept("classes"):
        read_classes(tmp_path / path.name, path.read_bytes())


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
def test_a_list_of_classes_that_never_ends_is_not_read(kind, tmp_path):
    write_clip(tmp_path / "train/v_ApplyEyeMakeup_g01_c01", 2)
    (tmp_path / "ucfTrainTestlist").mkdir()
    path = tmp_path / "ucfTrainTestlist/classInd.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    assert isinstance(outcome(lambda: slot(tmp_path, layout="ucf101").build()), UserError)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may read everything")
def test_a_frame_that_may_not_be_read_is_a_bad_sample(tmp_path):
    """In a process without root's rights."""
    root = Path(tempfile.mkdtemp(dir="/tmp", prefix="frames-"))
    try:
        write_clip(root / "train/v/a", 2)
        root.chmod(0o755)
        next((root / "train/v/a").iterdir()).chmod(0)
        code = (
            "from tests.fuzz.test_frames import *;"
            f"print(repr(outcome(lambda: slot(Path({str(root)!r})).build().read(0, np.random.default_rng(0)))))"
        )
        drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534"] if os.geteuid() == 0 else []
        done = in_a_process_of_its_own(code, *drop, home=root)
        assert "BadSample(" in done.stdout and "Permission denied" in done.stdout, done.stdout + done.stderr[-2000:]
    finally:
        shutil.rmtree(root)
