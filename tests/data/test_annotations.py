"""Tables of captions: whatever a csv or json-lines file may hold comes back, and its length costs no memory."""

import csv
import gc
import io
import json
import os
import pickle
import string
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.hashing import hash_of, hash_text
from data import annotations, samples
from data.annotations import COLUMNS, Source, index_of, recognise
from data.index import Index, Names, Writer
from tests.data.videos import resident

ROOT = Path("/videos")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
PATHS = st.text(string.ascii_letters + string.digits + " ,\"'éß雲\n_-", min_size=1, max_size=12).map(
    lambda t: f"{t}.mp4"
)
ROWS = st.lists(st.tuples(PATHS, TEXT), max_size=25)
UNCLOSED = 'name,contentUrl\nfine,a.mp4\n"' + "x,y\n" * (9 << 18)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("REGISTRY_CACHE", str(folder))
        yield folder


def source(text: str | bytes, layout: str = "csv", **changes: Any) -> Source:
    """A table of this content, in a folder of its own."""
    file = Path(tempfile.mkdtemp(dir=Path(os.environ["REGISTRY_CACHE"]).parent)) / "table"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    path, caption = COLUMNS[layout]
    return Source(**{"file": file, "layout": layout, "path": path, "caption": caption, "root": ROOT, **changes})


def rows_of(index: Index) -> list[tuple[str, str]]:
    return [index.row(place) for place in range(len(index))]


def csv_text(rows: Sequence[Sequence[str]], header: Sequence[str] = ("name", "contentUrl"), **dialect: Any) -> str:
    stream = io.StringIO(newline="")
    table = csv.writer(stream, **dialect)
    table.writerows([header, *rows])
    return stream.getvalue()


# ---- what comes back ----


@settings(max_examples=60)
@given(ROWS, st.sampled_from(["\r\n", "\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@example([("a.mp4", 'says "hi", twice\nand goes on'), ("b.mp4", ""), ("a.mp4", " padded ")], "\n", csv.QUOTE_MINIMAL)
def test_a_csv_comes_back_as_it_was_written(rows: list[tuple[str, str]], line_end: str, quoting: int):
    if any("\r" in caption for _, caption in rows):
        quoting = csv.QUOTE_ALL  # Python's writer leaves a lone carriage return without quotes, where it ends a line
    text = csv_text([(caption, path) for path, caption in rows], lineterminator=line_end, quoting=quoting)
    index = index_of(source(text))
    assert sorted(rows_of(index)) == sorted(rows)
    assert index.about["dropped"] == {}


@settings(max_examples=60)
@given(ROWS, st.booleans())
def test_json_lines_come_back_as_they_were_written(rows: list[tuple[str, str]], ascii_only: bool):
    lines = [json.dumps({"name": c, "afs_path": p, "more": 1}, ensure_ascii=ascii_only) for p, c in rows]
    index = index_of(source("\n".join(lines) + "\n", "jsonl"))
    assert sorted(rows_of(index)) == sorted(rows)


@settings(max_examples=30)
@given(ROWS.filter(bool), st.randoms())
def test_neither_the_order_of_the_rows_nor_the_layout_changes_what_a_table_is(rows: list[tuple[str, str]], chance: Any):
    other = chance.sample(rows, len(rows))
    lines = "\n".join(json.dumps({"name": c, "afs_path": p}) for p, c in other)
    one, two = index_of(source(csv_text([(c, p) for p, c in rows]))), index_of(source(lines, "jsonl"))
    assert one.about["digest"] == two.about["digest"]
    assert [p for p, _ in rows_of(one)] == [p for p, _ in rows_of(two)]


def test_columns_may_stand_anywhere_and_a_byte_order_mark_before_them():
    text = "\ufeffduration,contentUrl,page_dir,name\n3,x.mp4,p,a cloud\n"
    assert rows_of(index_of(source(text))) == [("x.mp4", "a cloud")]
    assert rows_of(index_of(source('\ufeff{"name": "a", "afs_path": "x.mp4"}\n', "jsonl"))) == [("x.mp4", "a")]


def test_a_path_can_be_made_of_several_columns():
    text = "videoid,contentUrl,page_dir,name\n17,https://host/x.mp4,000_001,a cloud\n"
    assert rows_of(index_of(source(text, path="videos/{page_dir}/{videoid}.mp4"))) == [
        ("videos/000_001/17.mp4", "a cloud")
    ]
    line = '{"name": "a cloud", "dir": "d", "id": 5}'
    assert rows_of(index_of(source(line, "jsonl", path="{dir}/{id}.mp4"))) == [("d/5.mp4", "a cloud")]


@pytest.mark.parametrize(
    ("text", "layout"),
    [("name,contentUrl\n", "csv"), ('  {"name": 1}\n', "jsonl"), ('\ufeff{"name": 1}', "jsonl"), ("", "csv")],
)
def test_a_table_is_recognised_by_its_first_character(text: str, layout: str):
    assert recognise(source(text).file) == layout


def test_one_json_list_is_not_json_lines():
    with pytest.raises(UserError, match="one JSON list; expected json-lines"):
        recognise(source('[{"name": "a"}]').file)


# ---- what is left out ----


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named():
    text = csv_text(
        [
            ("fine", "a.mp4"),
            ("no path", ""),
            ("up", "../secret.mp4"),
            ("up inside", "a/../../b.mp4"),
            ("root", "/etc/secret.mp4"),
            ("address", "https://host/x.mp4"),
            ("too", "many", "fields"),
            ("inside", "/videos/b.mp4"),
            ("dots in names", "..a/b..mp4"),
            ("here", "./c.mp4"),
        ]
    )
    index = index_of(source(text))
    assert sorted(path for path, _ in rows_of(index)) == ["..a/b..mp4", "a.mp4", "b.mp4", "c.mp4"]
    assert index.about["dropped"] == {
        "rows without a path (the first: '')": 1,
        "addresses, not paths (the first: 'https://host/x.mp4')": 1,
        "paths that leave the root (the first: '../secret.mp4')": 3,
        "rows of another number of fields (the first: 'too,many,fields')": 1,
    }


@given(st.lists(st.sampled_from(["..", ".", "a", "", "…", "b c"]), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60)
def test_no_path_of_a_table_leaves_the_root(parts: list[str], absolute: bool):
    path = "/" * absolute + "/".join(parts)
    for kept, _ in rows_of(index_of(source(csv_text([("caption", path)])))):
        assert os.path.normpath(ROOT / kept).startswith(f"{ROOT}/") or os.path.normpath(ROOT / kept) == str(ROOT)


def test_rows_that_are_not_utf8_are_left_out():
    index = index_of(source(b"name,contentUrl\ngut,a.mp4\nsch\xf6n,b.mp4\n"))
    assert rows_of(index) == [("a.mp4", "gut")]
    assert index.about["dropped"] == {"""rows that are not UTF-8 (the first: "b'b.mp4'")""": 1}


def test_broken_json_lines_are_counted_by_their_number():
    lines = ['{"name": "a", "afs_path": "a.mp4"}', "{broken", "", "7", '{"name": null, "afs_path": "b.mp4"}']
    lines += ['{"afs_path": "c.mp4"}', '{"name": "half \\ud800", "afs_path": "d.mp4"}', "[" * 100_000]
    index = index_of(source("\n".join(lines), "jsonl"))
    assert rows_of(index) == [("a.mp4", "a")]
    assert index.about["dropped"] == {
        "lines that are not a JSON object (the first: 'line 2')": 3,
        "lines without a text for path and caption (the first: 'line 5')": 3,
    }


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        (
            "name,contentURL\n",
            "csv",
            r"no column 'contentUrl' \(did you mean 'contentURL'\?\); it has 'name', 'contentURL'.*--data\.path",
        ),
        ("title,contentUrl\n", "csv", r"no column 'name'.*it has 'title', 'contentUrl'.*--data\.caption"),
        ('{"name": "a", "path": "b"}', "jsonl", r"no column 'afs_path' \(did you mean 'path'\?\)"),
        ("", "csv", "not a csv file with a header"),
        (UNCLOSED, "csv", "not a csv file that can be read.*quotation mark"),
    ],
)
def test_a_table_without_the_columns_says_what_it_has(text: str, layout: str, message: str):
    with pytest.raises(UserError, match=message):
        index_of(source(text, layout))


def test_a_table_that_cannot_be_read_leaves_nothing_in_the_cache(cache: Path):
    before = set(cache.iterdir())
    with pytest.raises(UserError):
        index_of(source(UNCLOSED))
    assert set(cache.iterdir()) == before


# ---- the index ----


def many(count: int) -> Source:
    return source(csv_text([(f"caption\n{n}", f"{n % 7}/{n}.mp4") for n in range(count)]))


def test_an_index_is_made_once_and_again_when_the_file_changes(cache: Path, monkeypatch: pytest.MonkeyPatch):
    table = many(10)
    first = index_of(table)
    monkeypatch.setattr(Writer, "add", None)  # to write once more would fail
    assert index_of(table).folder == first.folder
    monkeypatch.undo()
    with table.file.open("a") as file:
        file.write("more,more.mp4\r\n")
    second = index_of(table)
    assert second.folder != first.folder
    assert (len(first), len(second)) == (10, 11)
    before = table.file.stat()
    table.file.write_bytes(table.file.read_bytes().replace(b"more.mp4", b"last.mp4"))
    os.utime(table.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ("last.mp4", "more") in rows_of(index_of(table))


def test_rows_are_sorted_by_the_hash_of_their_path_over_all_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.index.ROWS", 64)
    monkeypatch.setattr(annotations, "BLOCK", 4096)
    index = index_of(many(1000))
    assert len(index.maps.starts) > 15
    hashes = [hash_text(path) for path, _ in rows_of(index)]
    assert hashes == sorted(hashes) == index.maps.hashes.tolist()
    assert all(path.endswith(f"/{caption.split()[1]}.mp4") for path, caption in rows_of(index))


def test_a_path_with_several_captions_gives_as_many_samples_with_names_of_their_own():
    index = index_of(source(csv_text([("one", "a.mp4"), ("other", "b.mp4"), ("two", "a.mp4"), ("three", "a.mp4")])))
    names = Names(index, 0, 4)
    found = dict(zip(names, rows_of(index), strict=True))
    assert found == {
        "a.mp4": ("a.mp4", "one"),
        "a.mp4#1": ("a.mp4", "two"),
        "a.mp4#2": ("a.mp4", "three"),
        "b.mp4": ("b.mp4", "other"),
    }
    hashes = dict(zip(names, names.hashes().tolist(), strict=True))
    assert len(set(hashes.values())) == 4
    assert (hashes["a.mp4"], hashes["b.mp4"]) == (hash_text("a.mp4"), hash_text("b.mp4"))


def test_names_are_a_sequence():
    index = index_of(many(30))
    names = Names(index, 5, 25)
    whole = [path for path, _ in rows_of(index)]
    assert list(names) == whole[5:25] and len(names) == 20
    assert (names[0], names[-1], names[3:6], names[np.int64(2)]) == (whole[5], whole[24], whole[8:11], whole[7])
    with pytest.raises(IndexError):
        names[20]
    with pytest.raises(IndexError):
        names[-21]


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_the_smaller_ones_videos(one: float, other: float):
    index = index_of(many_once())
    low, high = sorted((one, other))
    assert 1 <= index.below(low) <= index.below(high) <= len(index)
    assert index.below(1.0) == len(index) and index.below(0.0) == 1


def test_a_share_is_about_that_many_videos():
    assert 60 < index_of(many_once()).below(0.05) < 140


_kept: list[Source] = []


def many_once() -> Source:
    if not _kept:
        _kept.append(many(2000))
    return _kept[0]


def test_an_index_pickles_as_the_name_of_its_folder():
    index = index_of(many_once())
    row = index.row(7)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).row(7) == row  # noqa: S301


def test_the_order_of_an_epoch_is_that_of_its_names_hashes():
    names = Names(index_of(many_once()), 0, 2000)
    keys = [hash_of(3, 4, name) for name in names]
    dataset = samples.Samples(names, fingerprint="")
    assert [keys[place] for place in dataset.order(3, 4)] == sorted(keys)
    assert (names.hashes() == dataset.id_hashes()).all()


@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**64 - 1]), max_size=300), st.integers(1, 50))
def test_sorting_in_buckets_is_sorting(values: list[int], chunk: int):
    keys = np.array(values, np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CHUNK", chunk)
        assert samples.sorted_places(keys).tolist() == np.argsort(keys, kind="stable").tolist()


def test_many_rows_cost_hardly_any_memory_of_ones_own():
    """As lists they are 25 MB."""
    rows = ((f"a caption of a usual length, about a cloud, {n}", f"{n:08}/{n}.mp4") for n in range(100_000))
    table = source(csv_text(list(rows)))
    list(Names(index_of(table), 0, 10))
    gc.collect()
    before = resident()
    names = Names(index_of(table), 0, 100_000)
    order = samples.Samples(names, fingerprint="").order(0, 0)
    assert len({names[place] for place in order[:2000]}) == 2000
    assert resident() - before < 6
