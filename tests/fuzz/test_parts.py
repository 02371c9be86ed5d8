"""Parts, shards and lists from anywhere: each ends in samples, in bad samples that are counted, or in one line."""

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from data.slots import Base64Parts
from tests.data.parts import line, picture
from tests.fuzz.hostile import bounded, changed, keeping, kept, outcome, untouched

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
LINES = [line("a cat", picture(n, (10, 9))) for n in range(3)]


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


PARTS = {
    "plain": ("part-0", "laion400m", [b"".join(LINES), b"".join(LINES[:1])]),
    "gzip": ("part-0.gz", "laion400m", [gzip.compress(b"".join(LINES), mtime=0), gzip.compress(LINES[0], mtime=0) * 2]),
    "json": ("part-0", "laion_aes", [line('{"caption_en": "a cat"}', picture(1, (10, 9)), "__c__i") * 2]),
    "tar": (
        "part-0.tar",
        "webdataset",
        [tar_of([("1.jpg", picture(1, (10, 9))), ("1.txt", b"a"), ("2.png", b""), ("2.json", b'{"caption": "b"}')])],
    ),
}


def read_part(kind, content):
    """All samples of a folder of this part, or its refusal."""
    name, form, _ = PARTS[kind]
    with tempfile.TemporaryDirectory() as around, keeping(f"parts.{kind}", content):
        root = Path(around) / "root"
        root.mkdir()
        (root / name).write_bytes(content)
        os.environ["REGISTRY_CACHE"], before = f"{around}-cache", os.environ.get("REGISTRY_CACHE")
        try:
            with untouched(Path(around)):
                slot = Base64Parts(root=root, format=form, resolution=8, split="all", max_bad_share=1.0)
                return _samples(outcome(slot.build))
        finally:
            _restore(before, Path(f"{around}-cache"))


def _samples(dataset):
    if isinstance(dataset, UserError):
        return dataset
    read = lambda n: outcome(lambda: dataset.read(n, np.random.default_rng(0)))  # noqa: E731
    found = [read(n) for n in range(min(len(dataset), 20))]
    for sample in found:
        assert isinstance(sample, Exception) or sample["pixel_values"].shape == (3, 1, 8, 8)
    return found


def _restore(before, cache):
    shutil.rmtree(cache, ignore_errors=True)
    os.environ.pop("REGISTRY_CACHE")
    if before is not None:
        os.environ["REGISTRY_CACHE"] = before


@pytest.mark.parametrize("kind", PARTS)
def test_the_parts_that_are_changed_below_are_read(kind):
    for content in PARTS[kind][2]:
        found = read_part(kind, content)
        assert found and not isinstance(found[0], Exception), found


@pytest.mark.parametrize("kind", PARTS)
@bounded(60)
@given(data=st.data())
def test_a_changed_part_gives_samples_bad_samples_or_one_line(kind, data):
    read_part(kind, data.draw(changed(PARTS[kind][2])))


@pytest.mark.parametrize("path", [path for kind in PARTS for path in kept(f"parts.{kind}")], ids=lambda p: p.name)
def test_a_part_that_failed_once_gives_samples_bad_samples_or_one_line(path):
    read_part(path.parent.name.removeprefix("parts."), path.read_bytes())


LISTS = [b"a.filelist 0.5 format=laion400m\nb.filelist 0.5\n", b"part-0\npart-1\n", b"part-* 1\n./part-1 2\n"]
ODD = st.sampled_from(
    [
        b"\0",
        b"\xff",
        b"..",
        b"/",
        b"/etc/passwd",
        b"~",
        b" 1e400",
        b" -0",
        b"*" * 40,
        b"[",
        b"**/",
        b"\n" * 99,
        b"9" * 5000,
    ]
)


def read_list(content):
    with tempfile.TemporaryDirectory() as around, keeping("lists", content):
        root = Path(around) / "root"
        root.mkdir()
        for name in ("part-0", "part-1"):
            (root / name).write_bytes(LINES[0])
        for name in ("a", "b"):
            (root / f"{name}.filelist").write_text("part-0\npart-1\n")
        (root / "train.filelist.list").write_bytes(content)
        found = outcome(Base64Parts(root=root, resolution=8, split="all").build)
        assert isinstance(found, UserError) or 1 <= len(found) <= 2


@bounded(100)
@given(data=st.data())
def test_any_list_names_parts_below_the_root_or_is_refused_in_one_line(data):
    odd = st.builds(
        lambda whole, at, new: whole[:at] + new + whole[at:], st.sampled_from(LISTS), st.integers(0, 40), ODD
    )
    read_list(data.draw(st.one_of(changed(LISTS), odd)))


@pytest.mark.parametrize("path", kept("lists"), ids=lambda path: path.name)
def test_a_list_that_failed_once_is_read_or_refused_in_one_line(path):
    read_list(path.read_bytes())


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge", "folder"])
def test_a_list_that_is_no_ordinary_file_is_not_waited_for(kind, tmp_path):
    path = tmp_path / "train.filelist.list"
    if kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)  # sparse: it takes no room
    else:
        {"pipe": lambda: os.mkfifo(path), "endless": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    found = outcome(Base64Parts(root=tmp_path, file_list=path, split="all").build)
    assert isinstance(found, UserError)
