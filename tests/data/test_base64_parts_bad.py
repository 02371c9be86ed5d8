"""Parts, lists and records that are not as they should be: each is skipped, counted and named, or refused in a line."""

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.loader import Skipped, batches
from core.positions import START, Plan
from data.base64_parts import PartRecords
from data.samples import BadSample
from data.slots import Base64Parts
from tests.data.parts import SIDE, line, picture, write_part, write_parts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_parts(tmp_path / "laion", [4, 5])


def slot(root: Path, **changes: Any) -> Base64Parts:
    return Base64Parts(**{"root": root, "resolution": SIDE, "split": "all", **changes})


def captions(dataset: PartRecords) -> list[str]:
    return [dataset[0, 0, index, 0]["caption"] for index in range(len(dataset))]


# ---- parts ----


def test_a_missing_part_is_left_out_counted_and_named(root: Path):
    (root / "train.filelist.list").write_text("part-00000.gz\npart-00007.gz\npart-00001.gz\n")
    dataset = slot(root).build()
    assert len(dataset) == 9
    (said,) = (f"{name}: {count}" for name, count in dataset.describe().items() if name.startswith("dropped"))
    assert said == "dropped: parts: No such file or directory (the first: 'part-00007.gz'): 1"


def test_too_many_missing_parts_stop_the_run_before_it_starts(root: Path):
    (root / "train.filelist.list").write_text("part-00000.gz\n" + "".join(f"part-{n}.gz\n" for n in range(4)))
    with pytest.raises(UserError, match=r"4 of 5 parts cannot be used, more than data.max_bad_share = 0.05: part-0.gz"):
        slot(root).build()
    assert len(slot(root, max_bad_share=0.8).build()) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a cat\t\tAAAA\n", "is no gzip file, whatever its name says"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08" + b"junk" * 20, "is damaged: Error -3"),
        (gzip.compress(b""), "has no records"),
        (gzip.compress(b"\n\n\n"), "has no records"),
    ],
)
def test_a_part_that_is_no_gzip_is_left_out_and_named(root: Path, content: bytes, reason: str):
    (root / "part-00002.gz").write_bytes(content)
    dataset = slot(root).build()
    assert len(dataset) == 9
    (said,) = dataset.dropped
    assert said.startswith(f"parts: {reason}") and "part-00002.gz" in said
    for part in ("part-00000.gz", "part-00001.gz"):
        (root / part).unlink()
    with pytest.raises(UserError, match=f"none of the 1 parts below .*{reason}"):
        slot(root).build()


def test_a_cut_gzip_gives_the_records_before_the_cut_and_is_named(root: Path):
    whole = (root / "part-00001.gz").read_bytes()
    (root / "part-00001.gz").write_bytes(whole[: len(whole) // 2])
    dataset = slot(root).build()
    assert dataset.dropped == {"parts: is cut short; what comes before is used (the first: 'part-00001.gz')": 1}
    found = captions(dataset)
    assert (
        4 < len(found) < 9
        and found == [*(f"0.{n}" for n in range(1, 5)), *(f"1.{n}" for n in range(1, 6))][: len(found)]
    )


def test_a_gzip_whose_checksum_is_wrong_is_named(root: Path):
    content = bytearray((root / "part-00001.gz").read_bytes())
    content[-6] ^= 255
    (root / "part-00001.gz").write_bytes(content)
    (said,) = slot(root).build().dropped
    assert "incorrect data check" in said and "part-00001.gz" in said


def test_a_part_that_unpacks_to_a_thousand_times_its_size_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch):
    from data import parts

    monkeypatch.setattr(parts, "BOMB", 1 << 20)
    (root / "part-00002.gz").write_bytes(gzip.compress(bytes(8 << 20)))
    (said,) = slot(root).build().dropped
    assert said.startswith("parts: unpacks to more than 200 times its size")


def test_a_part_that_changes_while_a_run_reads_it_is_a_bad_sample(tmp_path: Path):
    for name, change in (("a", lambda path: path.write_bytes(b"x")), ("b", Path.unlink)):
        root = write_parts(tmp_path / name, [3], ending="")
        dataset = slot(root).build()
        dataset.records.reader.__init__(dataset.records.reader.parts, dataset.records.reader.indices)  # as in a worker
        change(root / "part-00000")
        with pytest.raises(BadSample, match=r"part-00000: (has changed since the run began|No such file)"):
            dataset.read(0, np.random.default_rng(0))


def test_a_pipe_or_a_link_that_leaves_the_root_is_not_read(root: Path):
    os.mkfifo(root / "part-pipe")
    (root / "part-out").symlink_to("/etc/passwd")
    dataset = slot(root).build()
    assert len(dataset) == 9
    assert sorted(name.partition(" (")[0] for name in dataset.dropped) == [
        "links that leave the root",
        "parts: is no file",
    ]


# ---- lists ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.filelist half\nb.filelist 1\n", "line 1: the weight 'half' is not a number"),
        ("a.filelist 1\nb.filelist -2\n", "line 2: the weight -2 must be a number above 0"),
        ("a.filelist 0\n", "line 1: the weight 0 must be a number above 0"),
        ("a.filelist nan\n", "line 1: the weight nan must be"),
        ("a.filelist 1e999\n", "line 1: the weight 1e999 must be"),
        ("a.filelist 1\nb.filelist\n", "line 2: b.filelist has no weight, and line 1 has one"),
        ("a.filelist 1 format=laion\n", r"line 1: format=laion: no such format \(did you mean 'laion_aes'\?\)"),
        ("a.filelist 1 2\n", r"line 1: a.filelist 1 does not exist below .* \(did you mean 'a.filelist'\?\)"),
        ("a.filelist\t0,5\n", "line 1: the weight '0,5' is not a number"),
        ("a.fileslist 1\nb.filelist 1\n", r"line 1: a.fileslist does not exist below .* \(did you mean 'a.filelist'"),
        ("a.filelist\ngone.filelist\n", "none of the parts of gone.filelist can be used: part-9.gz"),
        ("c.filelist\n", r"line 1: c.filelist does not exist below .* \(did you mean '.\.filelist'\?\)"),
        ("../a.filelist\n", "line 1: ../a.filelist leaves the data folder"),
        ("/etc/a.filelist\n", "line 1: /etc/a.filelist leaves the data folder"),
        ("../part-*.gz\n", "leaves the data folder"),
        ("\n \n", "is empty; expected a path"),
        ("\ud800.list\n", "cannot be read"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_its_line(root: Path, text: str, message: str):
    for name in ("a", "b"):
        (root / f"{name}.filelist").write_text("part-00000.gz\n")
    (root / "gone.filelist").write_text("part-9.gz\n")
    (root / "train.filelist.list").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=message):
        slot(root).build()


def test_several_lists_of_which_none_is_the_splits_are_an_error_that_names_them(root: Path):
    for name in ("one", "two"):
        (root / f"{name}.filelist.list").write_text("part-00000.gz\n")
    with pytest.raises(UserError, match=r"several lists \(one.filelist.list, two.filelist.list\)"):
        slot(root, split="train").build()
    with pytest.raises(UserError, match=r"the list thre.filelist.list does not exist.*did you mean"):
        slot(root, file_list=Path("thre.filelist.list")).build()


def test_a_wrong_format_is_told_before_the_run_starts(root: Path):
    with pytest.raises(UserError, match=r"none of the first 4 records of part-00000.gz .* has 3 columns, where the "):
        slot(root, format="laion_aes").build()
    with pytest.raises(UserError, match="a compressed tar"):
        slot(root, format="webdataset").build()


# ---- records ----


def header_of(content: bytes, width: int, height: int) -> bytes:
    """A JPEG that says another size."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + content[at + 4 :]


WHOLE = picture()
BAD = {
    "bad base64": (b"c\t\t!!!!\n", "its column 2 is not base64"),
    "base64 that is cut": (line("c")[:-6] + b"\n", "(is not base64|truncated|cannot identify|not an image|broken)"),
    "0 x 0": (line("c", header_of(WHOLE, 0, 0)), "."),
    "10,000 x 10,000": (
        line("c", header_of(WHOLE, 10_000, 10_000)),
        "(is 10000x10000: more than 33,177,600|exceeds limit)",
    ),
    "too narrow": (line("c", picture(size=(SIDE - 1, 40))), "is 15x40: smaller than 16x16"),
    "no picture": (line("c", b"%!PS-Adobe-3.0 EPSF-3.0"), "not an image"),
    "half a picture": (line("c", WHOLE[: len(WHOLE) // 2]), "[Tt]runcated"),
    "nothing": (b"c\t\t\n", "its column 2 is empty"),
    "one column": (b"only a caption\n", "has 1 columns"),
    "no known letters": (b"\xff\xff\xff" + line("c")[1:], "its caption is neither UTF-8 nor GB18030"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_bad_record_is_skipped_counted_and_named_by_part_and_line(tmp_path: Path, name: str, ending: str):
    content, reason = BAD[name]
    lines = [line("good"), content, *(line(f"good {n}") for n in range(6))]
    dataset = slot(write_part(tmp_path / f"p/part-00003{ending}", lines).parent).build()
    sample = dataset[0, 0, 1, 0]
    (bad,) = sample["bad"]
    assert bad[0] == f"part-00003{ending}:2" and sample["caption"].startswith("good")
    with pytest.raises(BadSample, match=reason):
        dataset.read(1, np.random.default_rng(0))
    skipped = Skipped(1.0)
    plan = Plan(dataset, 0, 8, 8)
    for batch in batches(dataset, plan.rank(0, 1, START, 1), workers=0, pin=False):
        assert [name for name, _ in skipped.count(batch)] == [f"part-00003{ending}:2"]


def test_blank_lines_are_no_records_but_count_as_lines_and_a_last_line_needs_no_end(tmp_path: Path):
    write_part(
        tmp_path / "p/part-0", [b"\n", line("a"), b"\r\n", line("b").replace(b"\n", b"\r\n"), line("c").rstrip()]
    )
    dataset = slot(tmp_path / "p").build()
    assert (captions(dataset), list(dataset.ids)) == (["a", "b", "c"], ["part-0:2", "part-0:4", "part-0:5"])


def test_where_a_whole_part_is_bad_its_stand_ins_come_from_others(tmp_path: Path):
    write_part(tmp_path / "p/part-0", [line("good", picture(n)) for n in range(8)])
    write_part(tmp_path / "p/part-1", [b"bad\t\t!\n"] * 4)
    dataset = slot(tmp_path / "p", max_bad_share=1.0).build()
    assert {dataset[0, epoch, 9, 0]["caption"] for epoch in range(20)} == {"good"}


# ---- tar shards ----


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_shard_of_others_is_read_and_what_is_no_record_of_it_is_passed_over(tmp_path: Path):
    members = [
        *(("a/1.jpg", picture(1)), ("a/1.txt", b"eins"), ("a/1.cls", b"3")),
        *(("a/2.json", b'{"caption": "zwei"}'), ("a/2.png", picture(2, form="PNG"))),
        ("a/3.txt", b"no picture"),
        *(("../../4.webp", picture(4, form="WEBP")), ("../../4.txt", b"")),
        *(("5.jpg", b"broken"), ("5.txt", b"five")),
    ]
    dataset = slot(shard(tmp_path / "p/shard-0.tar", members).parent, format="webdataset").build()
    assert [dataset.records.record(n).caption for n in range(4)] == ["eins", "zwei", "", "five"]
    assert captions(dataset)[:3] == ["eins", "zwei", ""] and dataset[0, 0, 3, 0]["bad"][0][0] == "shard-0.tar:5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "p"]


def test_a_shard_with_links_devices_or_a_cut_is_read_as_far_as_it_is_a_tar(tmp_path: Path):
    path = shard(
        tmp_path / "p/shard-0.tar",
        [(f"{n}.{kind}", content) for n in range(4) for kind, content in (("jpg", picture(n)), ("txt", b"x"))],
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:6000])
    dataset = slot(path.parent, format="webdataset").build()
    assert 1 <= len(dataset) < 4 and list(dataset.dropped) == [
        "parts: is cut short; what comes before is used (the first: 'shard-0.tar')"
    ]
    assert captions(dataset) == ["x"] * len(dataset) and not dataset[0, 0, len(dataset) - 1, 0]["bad"]
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("1.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with pytest.raises(UserError, match="none of the 1 parts"):
        slot(path.parent, format="webdataset").build()
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="is no tar that can be read"):
        slot(path.parent, format="webdataset").build()


def test_a_cache_that_cannot_be_written_is_told(root: Path, cache: Path):
    cache.write_text("a file, no folder")
    with pytest.raises(UserError, match=r"cannot write an index of part-00000.gz to the cache .*REGISTRY_CACHE"):
        slot(root).build()


def test_a_bad_sample_names_itself_once(tmp_path: Path):
    image = Image.new("RGB", (SIDE, SIDE - 1))
    file = io.BytesIO()
    image.save(file, "PNG")
    dataset = slot(write_part(tmp_path / "p/part-0", [line("small", file.getvalue())]).parent).build()
    with pytest.raises(
        UserError, match=r"9 samples in a row cannot be read: the first is part-0:1 \(is 16x15: smaller"
    ):
        dataset[0, 0, 0, 0]
