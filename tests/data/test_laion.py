"""Parts made, listed and converted: by the real command line, and read again by the data slot and by plain tarfile."""

import tarfile
from pathlib import Path

import pytest

import registry
from core.errors import UserError
from data.laion import synthetic, write_part
from data.slots import Base64Parts
from tests.data.parts import line, picture
from tests.data.parts import write_part as write_lines


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))


def data(*words: object) -> int:
    return registry.main(["data", *map(str, words)])


def records(root: Path, **changes) -> list[tuple[str, bytes]]:
    found = Base64Parts(root=root, resolution=16, split="all", **changes).build().records
    return [tuple(found.record(n))[1:] for n in range(len(found))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_make_writes_the_records_that_were_asked_for_and_the_same_again(tmp_path: Path, capsys):
    for name in ("one", "again"):
        assert data("make", "laion", "--out", tmp_path / name, "--records", 7, "--parts", 3, "--size", 32) == 0
    assert sorted(files(tmp_path / "one")) == ["part-00000.gz", "part-00001.gz", "part-00002.gz"]
    assert files(tmp_path / "one") == files(tmp_path / "again")
    assert f"{tmp_path}/one/part-00002.gz: 3 records" in capsys.readouterr().out
    found = records(tmp_path / "one")
    assert len({content for _, content in found}) == len(found) == 7 and all(caption for caption, _ in found)
    assert data("make", "laion", "--out", tmp_path / "plain", "--records", 2, "--parts", 9, "--plain") == 0
    assert sorted(files(tmp_path / "plain")) == ["part-00000", "part-00001"]


def test_make_takes_the_pictures_and_captions_of_a_folder_as_they_are(tmp_path: Path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name, caption in (("a.jpg", "a cat,\n\ta mat"), ("deep/b.png", None), ("c.jpeg", "")):
        (tmp_path / "in" / name).write_bytes(picture(len(name), form="PNG" if name.endswith("png") else "JPEG"))
        if caption is not None:
            (tmp_path / "in" / name).with_suffix(".txt").write_text(caption)
    assert data("make", "laion", "--out", tmp_path / "out", "--pictures", tmp_path / "in", "--parts", 1) == 0
    names = {"a.jpg": "a cat, a mat", "c.jpeg": "", "deep/b.png": ""}
    assert records(tmp_path / "out") == [(text, (tmp_path / "in" / name).read_bytes()) for name, text in names.items()]


def test_list_writes_lists_that_the_slot_finds_and_replaces_them_only_when_told(tmp_path: Path, capsys):
    root = tmp_path / "laion"
    for name in ("part-00001.gz", "deep er/part-00000"):
        write_lines(root / name, [line(name)])
    assert data("list", "laion", root) == 0
    assert files(root)["laion400m_en.filelist"] == b"part-00001.gz\ndeep er/part-00000\n"
    assert files(root)["train.filelist.list"] == b"laion400m_en.filelist format=laion400m\n"
    assert [caption for caption, _ in records(root)] == ["part-00001.gz", "deep er/part-00000"]
    assert data("list", "laion", root) == 2 and "exists: --overwrite replaces it" in capsys.readouterr().err
    assert data("list", "laion", root, "--overwrite") == 0
    assert data("list", "laion", root, "--to", tmp_path / "lists", "--format", "caption=0,image=2") == 0
    elsewhere = tmp_path / "lists/train.filelist.list"
    assert [caption for caption, _ in records(root, file_list=elsewhere)] == ["part-00001.gz", "deep er/part-00000"]


def test_convert_makes_shards_of_the_same_records_and_names_the_broken_ones(tmp_path: Path, capsys):
    root = tmp_path / "laion"
    lines = [
        line(f"caption {n}", picture(n, form=form)) for n, form in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP"))
    ]
    write_lines(root / "part-00000.gz", [*lines, line("broken", b"broken"), line("")])
    assert data("convert", root, "--to", tmp_path / "tars", "--records", 4) == 0
    out = capsys.readouterr().out
    assert "6 records, 1 skipped" in out and "part-00000.gz:6: not an image" in out
    with tarfile.open(tmp_path / "tars/shard-00000.tar") as tar:
        assert tar.getnames()[:4] == ["000000000.jpg", "000000000.txt", "000000001.png", "000000001.txt"]
    assert sorted(files(tmp_path / "tars")) == [
        "shard-00000.tar",
        "shard-00001.tar",
        "shards.filelist",
        "train.filelist.list",
    ]
    before = records(root)
    assert records(tmp_path / "tars") == before[:5] + before[6:]
    assert data("convert", tmp_path / "tars", "--to", tmp_path / "again", "--records", 4) == 0
    assert files(tmp_path / "again") == files(tmp_path / "tars")


def test_convert_takes_a_list_and_a_glob(tmp_path: Path):
    for number in range(2):
        (tmp_path / "laion").mkdir(exist_ok=True)
        write_part(tmp_path / f"laion/part-{number}", _two(number))
    (tmp_path / "mine.list").write_text("laion/part-1\n")
    assert data("convert", tmp_path / "mine.list", "--to", tmp_path / "a") == 0
    assert data("convert", tmp_path / "laion/part-*", "--to", tmp_path / "b") == 0
    assert (len(records(tmp_path / "a")), len(records(tmp_path / "b"))) == (2, 4)


def _two(seed: int):
    return list(synthetic("train", 2, 16, seed))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["make"], "data needs make, list, convert, check, plan or cache, and what"),
        (["mak", "laion"], "data mak: unknown (did you mean 'make'?)"),
        (["make", "lion", "--out", "x"], "only laion can be made and listed (did you mean 'laion'?)"),
        (["make", "laion"], "--out DIR says where the parts go"),
        (["make", "laion", "--out", "x", "--records", "0"], "MakeFlags.records = 0: must be at least 1"),
        (["make", "laion", "--out", "/proc/x"], "cannot write to /proc/x"),
        (["make", "laion", "--out", "x", "--pictures", "/no/such"], "--pictures /no/such is no folder"),
        (["list", "laion"], "needs the folder of the parts"),
        (["list", "laion", "/no/such"], "/no/such is no folder"),
        (["list", "laion", "/proc/sys", "--formt", "x"], "unknown flag --formt (did you mean '--format'?)"),
        (["convert", "/no/such", "--to", "x"], "/no/such does not exist"),
        (["convert", "/no/such"], "--to DIR says where the shards go"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_what_is_there_is_not_written_over(tmp_path: Path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    assert data("make", "laion", "--out", tmp_path / "full") == 2
    assert f"{tmp_path}/full is not empty" in capsys.readouterr().err


def test_a_part_that_fails_while_it_is_written_leaves_nothing(tmp_path: Path):
    def failing():
        yield from synthetic("train", 1, 16)
        raise UserError("no more")

    with pytest.raises(UserError):
        write_part(tmp_path / "part-0.gz", failing())
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_each_lists_its_flags(capsys):
    for what, flag in (("make", "--pictures"), ("list", "--overwrite"), ("convert", "--records")):
        assert data(what, "--help") == 0
        assert flag in capsys.readouterr().out
