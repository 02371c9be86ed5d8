"""Parts of captioned pictures: written from synthetic pictures or a folder, listed, and turned into tar shards.

What a part looks like is LAION-400M's: caption, an empty column, the picture in base64, separated by tabs (LDM sheet
§5.2).
"""

from __future__ import annotations

import binascii
import contextlib
import gzip
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from core.errors import UserError
from data.cache import cached
from data.frames import IMAGES, listing
from data.part_lists import FIRST, walk
from data.pictures import WEB_FORMATS, decoded
from data.records import Record, text_of
from data.samples import BadSample
from data.synthetic_pictures import DEFAULT, pictures
from data.synthetic_pictures import VERSION as PICTURES_VERSION

if TYPE_CHECKING:
    from data.part_table import Records

VERSION = 1  # of the parts of synthetic pictures: raise it when they change
PARTS = {"train": 6, "test": 1}  # of the synthetic set
JPEG = {"quality": 95, "subsampling": 0}  # of pictures that are written here: small ones lose their colours otherwise
LIST_NAME = "laion400m_en.filelist"  # as the original's
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "PPM": "ppm"}


class Captioned(NamedTuple):
    """A picture's file, as bytes, and its caption."""

    caption: str
    picture: bytes


# ---- where pictures come from ---------------------------------------------------------------------------------------


def synthetic(split: str, count: int, size: int = DEFAULT["size"], seed: int = DEFAULT["seed"]) -> Iterator[Captioned]:
    """Pictures whose captions say what can be measured in them."""
    return (Captioned(caption, _jpeg(pixels)) for caption, pixels in pictures(split, count, size, seed))


def _jpeg(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **JPEG)
    return file.getvalue()


def pictures_of(folder: Path) -> list[Path]:
    """The pictures below a folder. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"--pictures {folder} is no folder; name one with pictures and their captions (a.jpg, a.txt).")
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith((*IMAGES, ".webp")) and path.is_file())
    if not paths:
        raise UserError(f"no pictures ({', '.join(IMAGES[::2])}, .webp) in {folder}; it holds {listing(folder)}.")
    return paths


def of_files(paths: Iterable[Path], folder: Path) -> Iterator[Captioned]:
    """Pictures as they are, each with the text beside it (a.txt of a.jpg), or without a caption."""
    root = folder.resolve()
    for path in paths:
        text = path.with_suffix(".txt")
        caption = text_of(str(text), _file(text, root)) if text.is_file() else ""
        yield Captioned(caption, _file(path, root))


def _file(path: Path, root: Path) -> bytes:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise UserError(f"{path} is a link that leaves {root}.")
    try:
        return real.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


# ---- parts ----------------------------------------------------------------------------------------------------------


def write_part(path: Path, records: Iterable[Captioned]) -> int:
    """One part: gzip where its name ends in .gz, the same bytes for the same records. Returns how many there were."""
    count = 0
    with _writing(path) as half, half.open("wb") as file:
        zipped = path.suffix == ".gz"
        out = gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) if zipped else file
        for caption, picture in records:
            line = b"\t".join((_plain(caption).encode(), b"", binascii.b2a_base64(picture, newline=False)))
            out.write(line + b"\n")
            count += 1
        if zipped:
            out.close()
    return count


def _plain(caption: str) -> str:
    """On one line, and without what separates columns."""
    return " ".join(caption.split())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A place beside `path`, renamed to it when all went well."""
    half = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def make(
    out: Path, *, records: int, parts: int, size: int, seed: int, plain: bool, pictures: Path | None
) -> Iterator[tuple[str, int]]:
    """Write `out/part-00000.gz`, …, of synthetic pictures, or of the first pictures of a folder. Yields each part's
    name and how many records it has. Raises UserError where `out` has files.
    """
    paths = pictures_of(pictures)[:records] if pictures else []
    _fresh(out)
    source = of_files(paths, pictures) if pictures else synthetic("train", records, size, seed)
    total = len(paths) if pictures else records
    for number, share in enumerate(_shares(total, min(parts, total))):
        name = f"part-{number:05}" + ("" if plain else ".gz")
        yield name, write_part(out / name, islice(source, share))


def _shares(total: int, parts: int) -> list[int]:
    """As equal as can be."""
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


def _fresh(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name another folder.")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; name another folder.") from None


def pictures_root() -> Path:
    """The synthetic parts' folder in the cache, written on first use: train/part-00000.gz, …, and test."""

    def write(folder: Path) -> None:
        for split, parts in PARTS.items():
            (folder / split).mkdir()
            total = DEFAULT[f"{split}_pictures"]
            source = synthetic(split, total)
            for number, share in enumerate(_shares(total, parts)):
                write_part(folder / split / f"part-{number:05}.gz", islice(source, share))

    return cached("laion", VERSION, {**DEFAULT, **PARTS, "pictures": PICTURES_VERSION}, write)


# ---- lists ----------------------------------------------------------------------------------------------------------


def write_lists(folder: Path, to: Path | None, *, format: str, overwrite: bool) -> tuple[Path, int]:
    """The original's `write_filelist.py` for what is there: a list of all parts below `folder`, and the list of that
    one list with its format. Returns the latter and the number of parts. Paths are relative to `folder`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the one with the parts.")
    root = folder.resolve()
    names = [path.relative_to(root).as_posix() for path in walk(root)]
    odd = [name for name in names if not name.isprintable() or name != name.strip()]
    if odd or not names:
        what = f"{odd[0]!r} cannot be written in a list" if odd else f"no parts in it; it holds {listing(root)}"
        raise UserError(f"{folder}: {what}.")
    first = (to or root) / f"train{FIRST}"
    _write_list(first.with_name(LIST_NAME), names, overwrite)
    _write_list(first, [f"{LIST_NAME} format={format}"], overwrite)
    return first, len(names)


def _write_list(path: Path, lines: list[str], overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: --overwrite replaces it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writing(path) as half:
            half.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None


# ---- tar shards -----------------------------------------------------------------------------------------------------


def convert(
    where: Path, root: Path | None, format: str, to: Path, most: int
) -> tuple[Iterator[tuple[str, int]], list[tuple[str, str]]]:
    """All records of a list, a folder or a glob as shards, which are written as they are taken; and the list that those
    which cannot be read are then added to.
    """
    from data.part_table import Records
    from data.slots import Base64Parts

    slot = Base64Parts(root=root or where, file_list=where if root else None, format=format, split="all")
    shards = Shards(Records(slot), to, most)
    return shards.write(), shards.skipped


class Shards:
    """Records as tar shards for webdataset: `000000000.jpg` and `000000000.txt`, pictures as they were. `skipped`: the
    records that cannot be read, by name and reason.
    """

    def __init__(self, records: Records, out: Path, most: int):
        self.records, self.out, self.most = records, out, most
        self.skipped: list[tuple[str, str]] = []

    def write(self) -> Iterator[tuple[str, int]]:
        """Yields each shard's name and how many records it has; at last there are lists, so that the folder is a
        root.
        """
        _fresh(self.out)
        names: list[str] = []
        good, number = self._good(), 0
        while part := list(islice(good, self.most)):
            names.append(f"shard-{len(names):05}.tar")
            with _writing(self.out / names[-1]) as half, tarfile.open(half, "w", format=tarfile.USTAR_FORMAT) as tar:
                for record in part:
                    _add(tar, f"{number:09}.{_ending(record)}", record.picture)
                    _add(tar, f"{number:09}.txt", record.caption.encode())
                    number += 1
            yield names[-1], len(part)
        _write_list(self.out / "shards.filelist", names, False)
        _write_list(self.out / f"train{FIRST}", ["shards.filelist format=webdataset"], False)

    def _good(self) -> Iterator[Record]:
        for number in range(len(self.records)):
            try:
                record = self.records.record(number)
                decoded(io.BytesIO(record.picture), record.name, least=1, formats=WEB_FORMATS)
            except BadSample as fault:
                self.skipped.append((fault.name, fault.reason))
            else:
                yield record


def _ending(record: Record) -> str:
    with Image.open(io.BytesIO(record.picture), formats=WEB_FORMATS) as image:
        return ENDINGS[image.format or "JPEG"]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Without time and owner: the same shard for the same records."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
