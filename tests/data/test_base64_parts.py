"""Parts of captioned pictures: what is found and read, in which order, by how many workers, from which step on."""

import gzip
import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import UserError
from core.loader import batches
from core.positions import START, Plan
from core.slots.slot import SlotError
from data import part_order, part_reading, parts
from data.base64_parts import PartRecords
from data.part_order import Chunks, Mixture, Order
from data.pictures import random_crop
from data.slots import Base64Parts
from tests.data.parts import SIDE, line, picture, write_part, write_parts


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own; chunks of 4 records, windows of 2 chunks."""
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parts, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(part_order, "WINDOW", 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three gzip parts of 7, 12 and 1 records."""
    return write_parts(tmp_path / "laion", [7, 12, 1])


def slot(root: Path, **changes: Any) -> Base64Parts:
    return Base64Parts(**{"root": root, "resolution": SIDE, "split": "all", **changes})


def captions(dataset: PartRecords, order: Any = None, seed: int = 0, epoch: int = 0) -> list[str]:
    found = range(len(dataset)) if order is None else order.tolist()
    return [dataset[seed, epoch, index, 0]["caption"] for index in found]


EVERY = [f"{part}.{n}" for part, count in enumerate([7, 12, 1]) for n in range(1, count + 1)]


# ---- what is read ----


def test_a_sample_is_a_clip_of_one_frame_with_its_caption(root: Path):
    sample = slot(root).build()[0, 0, 0, 5]
    pixels = sample["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((3, 1, SIDE, SIDE), torch.float32)
    assert -1 <= pixels.min() < pixels.max() <= 1
    assert (sample["caption"], sample["id"], sample["place"], sample["bad"]) == ("0.1", "part-00000.gz:1", 5, [])
    assert slot(root).clip_shape() == (1, SIDE, SIDE)


@pytest.mark.parametrize("ending", [".gz", "", ".tsv"])
def test_gzip_and_plain_parts_hold_the_same_records(tmp_path: Path, ending: str):
    dataset = slot(write_parts(tmp_path / "parts", [7, 12, 1], ending)).build()
    assert captions(dataset) == EVERY


def test_a_part_gives_the_same_batches_whether_it_is_compressed_or_not(tmp_path: Path):
    plain, zipped = (write_parts(tmp_path / name, [7, 12], "") for name in ("plain", "zipped"))
    for part in zipped.iterdir():
        part.write_bytes(gzip.compress(part.read_bytes()))
    one, other = (slot(root).build() for root in (plain, zipped))
    assert one.fingerprint == other.fingerprint and one.order(3, 1)[:].tolist() == other.order(3, 1)[:].tolist()
    for index in range(19):
        assert torch.equal(one[3, 1, index, 0]["pixel_values"], other[3, 1, index, 0]["pixel_values"])


def test_a_gzip_file_of_several_members_and_many_chunks_is_read_to_its_end(tmp_path: Path):
    for number in range(3):
        write_part(tmp_path / f"{number}.gz", [line(f"{number}.{n}") for n in range(9)])
    whole = tmp_path / "parts/part-00000.gz"
    whole.parent.mkdir()
    whole.write_bytes(b"".join((tmp_path / f"{number}.gz").read_bytes() for number in range(3)))
    dataset = slot(whole.parent).build()
    assert captions(dataset) == [f"{number}.{n}" for number in range(3) for n in range(9)]
    assert dataset.dropped == {}


def test_columns_are_stated_and_json_captions_take_the_first_key_that_says_something(tmp_path: Path):
    said = [{"caption_en": "a cat"}, {"caption_en": "", "blip_caption_en": "a dog"}, {"other": "x"}, {"caption_en": 3}]
    write_part(tmp_path / "aes/part-0", [line(json.dumps(s), columns="__c__i") for s in said])
    dataset = slot(tmp_path / "aes", format="laion_aes").build()
    assert captions(dataset) == ["a cat", "a dog", "", ""]
    write_part(tmp_path / "other/part-0", [line("x", columns="i_c")])
    assert captions(slot(tmp_path / "other", format="caption=2,image=0").build()) == ["x"]


@pytest.mark.parametrize("text", ["caption=0", "laion400", "caption=1,image=1", "caption=0,image=1000", "image=0", ""])
def test_a_format_that_is_none_is_refused_where_it_is_stated(text: str):
    with pytest.raises(SlotError, match=r"Base64Parts.format = .*laion400m"):
        Base64Parts(format=text)


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        (b"", ""),
        ("一只猫".encode(), "一只猫"),
        ("中文图片".encode("gb18030"), "中文图片"),
        ("🐈‍⬛🎉".encode(), "🐈‍⬛🎉"),
        ("x" * 10_000, "x" * 10_000),
        (b" two  words ", " two  words "),
    ],
)
def test_captions_that_are_empty_long_chinese_or_emoji_come_through(tmp_path: Path, raw: Any, caption: str):
    write_part(tmp_path / "parts/part-0.gz", [line(raw), line("next")])
    assert captions(slot(tmp_path / "parts").build()) == [caption, "next"]


def test_the_shorter_side_becomes_resolution_over_nine_tenths_and_the_crop_lies_anywhere(tmp_path: Path):
    """Against the plain way: resize the whole picture, then crop."""
    smooth = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    for width, height in ((640, 320), (300, 400), (284, 284), (256, 900)):
        image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
        short = int(256 / 0.9)
        sides = (short, short * height // width) if width < height else (short * width // height, short)
        assert (short, sides) == (284, {640: (568, 284), 300: (284, 378), 284: (284, 284), 256: (284, 998)}[width])
        whole = np.asarray(image.resize(sides, Image.Resampling.LANCZOS)).astype(int)
        corners = set()
        for seed in range(12):
            crop = random_crop(image, short, 256, np.random.default_rng(seed))
            rng = np.random.default_rng(seed)
            top, left = int(rng.integers(0, sides[1] - 255)), int(rng.integers(0, sides[0] - 255))
            corners.add((top, left))
            off = np.abs(whole[top : top + 256, left : left + 256] - crop)
            assert off.max() <= 2 and (off > 0).mean() < 0.05
        assert len(corners) > 9


def test_the_crop_differs_from_epoch_to_epoch_and_not_from_run_to_run(root: Path):
    one, other = slot(root).build(), slot(root).build()
    crops = [one[0, epoch, 3, 0]["pixel_values"] for epoch in range(8)]
    assert torch.equal(crops[2], other[0, 2, 3, 9]["pixel_values"])
    assert len({crop.numpy().tobytes() for crop in crops}) > 4


# ---- which parts ----


def test_a_folder_a_glob_a_list_and_one_part_are_all_roots(root: Path):
    (root / "notes.md").write_text("no part")
    (root / "mine.filelist").write_text("part-00002.gz\npart-00000.gz\n")
    (root / "deep").mkdir()
    (root / "part-00001.gz").rename(root / "deep/part-00001.gz")
    assert sorted(captions(slot(root).build())) == sorted(EVERY)
    assert captions(slot(root / "part-0000[02].gz").build()) == [*EVERY[:7], "2.1"]
    assert captions(slot(root / "*/part-*.gz").build()) == EVERY[7:19]
    assert captions(slot(root / "mine.filelist").build()) == ["2.1", *EVERY[:7]]
    assert captions(slot(root / "part-00002.gz").build()) == ["2.1"]
    assert slot(root / "*/part-*.gz").needs() == root


def test_the_originals_lists_are_read_as_they_are(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Paths from the working directory, below which everything lies."""
    monkeypatch.chdir(root.parent)
    lists = root.parent / "filelist"
    lists.mkdir()
    (lists / "laion400m_en.filelist").write_text("./laion/part-00000.gz\n./laion/part-00002.gz\n")
    (lists / "train.filelist.list").write_text("./filelist/laion400m_en.filelist\n")
    dataset = slot(Path(), file_list=lists / "train.filelist.list").build()
    assert captions(dataset) == [*EVERY[:7], "2.1"]


def two_lists(root: Path, first: str, second: str) -> Path:
    (root / "a.filelist").write_text("part-00000.gz\npart-00002.gz\n")
    (root / "b.filelist").write_text("part-00001.gz\n")
    (root / "train.filelist.list").write_text(f"a.filelist{first}\nb.filelist{second}\n")
    return root


def test_every_entry_of_a_list_has_its_own_format(root: Path):
    write_part(root / "part-00001.gz", [line('{"caption_en": "aes"}', columns="__c__i")])
    dataset = slot(two_lists(root, "", " format=laion_aes")).build()
    assert captions(dataset) == [*EVERY[:7], "2.1", "aes"]


@pytest.mark.parametrize(("first", "second", "share"), [(" 3", "\t1", 0.75), ("", "", 0.5), (" 0.001", " 0.009", 0.1)])
def test_lists_are_drawn_from_by_weight_and_equally_without(root: Path, first: str, second: str, share: float):
    """In any stretch of an epoch, not just on average; and what an epoch leaves out, the next one begins with."""
    dataset = slot(two_lists(root, first, second)).build()
    drawn = [captions(dataset, dataset.order(0, epoch)[:], epoch=epoch) for epoch in range(12)]
    stream = [caption for epoch in drawn for caption in epoch]
    of_b = Counter(caption for caption in stream if caption.startswith("1."))
    assert of_b.total() == pytest.approx((1 - share) * len(stream), abs=12)
    for start in range(0, len(stream) - 20, 20):
        here = sum(caption.startswith("1.") for caption in stream[start : start + 20])
        assert here == pytest.approx((1 - share) * 20, abs=1.01)
    assert len(of_b) == 12 and max(of_b.values()) - min(of_b.values()) <= 1


def test_a_record_that_an_epoch_draws_twice_has_two_names_and_two_crops(root: Path):
    dataset = slot(two_lists(root, " 9", " 1")).build()
    samples = [dataset[0, 0, index, 0] for index in dataset.order(0, 0)[:].tolist()]
    again = [sample for sample in samples if "#" in sample["id"]]
    assert len({sample["id"] for sample in samples}) == len(samples) == 20 and len(again) >= 9
    first = {sample["id"]: sample for sample in samples}[again[0]["id"].split("#")[0]]
    assert first["caption"] == again[0]["caption"]
    assert not torch.equal(first["pixel_values"], again[0]["pixel_values"])


def test_without_splits_on_disk_a_share_is_held_out_by_hash_and_nothing_is_on_both_sides(root: Path):
    whole = slot(root, split="train", held_out_share=0.3)
    train, held_out = (set(captions(part.build())) for part in (whole, whole.held_out()))
    assert train | held_out == set(EVERY) and not train & held_out and held_out
    write_parts(root / "more", [9])
    more = {caption for caption, name in zip(*_read(whole.held_out().build()), strict=True) if "more" not in name}
    assert more == held_out, "a record changed sides when others joined"
    tiny = whole.but(held_out_share=1e-9)
    assert len(tiny.held_out().build()) == 1 and len(tiny.build()) == 28


def _read(dataset: PartRecords) -> tuple[list[str], list[str]]:
    return captions(dataset), list(dataset.ids)


def test_folders_or_lists_of_the_splits_names_are_the_splits(root: Path):
    for split, part in (("train", 0), ("test", 1)):
        (root / split).mkdir()
        (root / f"part-0000{part}.gz").rename(root / split / f"part-0000{part}.gz")
    whole = slot(root, split="train")
    assert (captions(whole.build()), captions(whole.held_out().build())) == (EVERY[:7], EVERY[7:19])
    (root / "train.filelist.list").write_text("part-00002.gz\n")
    (root / "test.filelist.list").write_text("train/part-00000.gz\n")
    assert (captions(whole.build()), captions(whole.held_out().build())) == (["2.1"], EVERY[:7])


def test_a_list_or_folder_of_the_training_split_alone_is_parted_by_share(root: Path):
    (root / "train.filelist.list").write_text("part-00000.gz\npart-00001.gz\n")
    whole = slot(root, split="train", held_out_share=0.3)
    train, held_out = (set(captions(part.build())) for part in (whole, whole.held_out()))
    assert not train & held_out and train | held_out == set(EVERY[:19])


# ---- order ----


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=40).filter(any),
    seed=st.integers(-(2**63), 2**63),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_is_a_permutation_and_any_stretch_of_it_is_the_same_alone(sizes: list[int], seed: int, epoch: int):
    hashes = np.random.default_rng(len(sizes)).integers(0, 2**63, len(sizes)).astype(np.uint64)
    order = Order(Mixture([Chunks(hashes, np.array(sizes), 0)], [1]), seed, epoch)
    whole = order[:]
    assert sorted(whole.tolist()) == list(range(sum(sizes)))
    alone = Order(Mixture([Chunks(hashes, np.array(sizes), 0)], [1]), seed, epoch)
    pieces = [alone[start : start + 3] for start in reversed(range(0, len(whole), 3))]
    assert np.concatenate(pieces[::-1]).tolist() == whole.tolist()


@given(weights=st.lists(st.integers(1, 2**30), min_size=1, max_size=6), total=st.integers(1, 300))
def test_each_position_draws_from_one_list_and_each_list_gets_its_share_of_every_beginning(
    weights: list[int], total: int
):
    mixture = Mixture([Chunks(np.zeros(1, np.uint64), np.array([5]), 5 * n) for n in range(len(weights))], weights)
    drawn = mixture.drawn(np.arange(total + 1))
    assert (drawn.sum(axis=0) == np.arange(total + 1)).all()
    assert set(np.unique(np.diff(drawn, axis=1))) <= {0, 1}
    shares = np.array(weights)[:, None] / sum(weights) * np.arange(total + 1)
    assert np.abs(drawn - shares).max() <= len(weights)


def test_records_of_a_window_are_mixed_and_windows_stay_together(tmp_path: Path):
    """8 records at a time from 2 chunks: what is decompressed is used up before the next."""
    dataset = slot(write_parts(tmp_path / "p", [16, 16])).build()
    order = dataset.order(0, 0)[:]
    for window in order.reshape(4, 8):
        assert len({index // 4 for index in window.tolist()}) == 2
        assert (np.diff(window) != 1).any()
    assert dataset.order(0, 1)[:].tolist() != order.tolist() != dataset.order(1, 0)[:].tolist()


# ---- steps, workers, ranks ----


def stream(dataset: PartRecords, plan: Plan, start: Any = START, updates: int = 9, ranks: int = 1, workers: int = 0):
    """Per rank: caption, id and pixels of every sample."""
    found = []
    for rank in range(ranks):
        loaded = batches(dataset, plan.rank(rank, ranks, start, updates), workers=workers, pin=False)
        samples = [
            (caption, name, pixels.numpy().tobytes())
            for batch in loaded
            for caption, name, pixels in zip(batch["caption"], batch["id"], batch["pixel_values"], strict=True)
        ]
        found.append(samples)
    return found


def test_resumed_at_any_step_the_batches_are_those_of_the_uninterrupted_run(root: Path):
    plan = Plan(slot(root).build(), 3, 4, 2)
    (whole,) = stream(plan.dataset, plan)
    position = START
    for step in range(9):
        fresh = slot(root).build()
        (rest,) = stream(fresh, Plan(fresh, 3, 4, 2), position, updates=1)
        assert rest == whole[4 * step : 4 * step + 4]
        _, position = plan.update(position)
    assert position.epoch == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 6 worker")
def test_no_workers_and_six_workers_give_the_same_batches(root: Path, monkeypatch: pytest.MonkeyPatch):
    """More workers than parts: none is empty, because a worker reads positions and not parts. The index is made by
    several processes too.
    """
    monkeypatch.setattr(parts, "ALONE", 1)
    write_part(root / "part-00000.gz", [line(f"0.{n}") if n % 3 else line(f"0.{n}", b"broken") for n in range(1, 8)])
    dataset = slot(root).build()
    plan = Plan(dataset, 0, 6, 2)
    assert stream(dataset, plan, updates=6, workers=6) == stream(dataset, plan, updates=6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_an_epoch_without_loss_even_when_there_are_more_of_them_than_parts(root: Path, ranks: int):
    dataset = slot(root).build()
    plan = Plan(dataset, 0, 4, 1)
    found = stream(dataset, plan, updates=5, ranks=ranks)
    assert sorted(caption for rank in found for caption, _, _ in rank) == sorted(EVERY)
    (alone,) = stream(dataset, plan, updates=5)
    assert sorted(sample for rank in found for sample in rank) == sorted(alone)


def test_a_pickled_dataset_reads_and_orders_the_same(root: Path):
    dataset = slot(two_lists(root, " 2", " 1")).build()
    order = dataset.order(0, 0)[:]
    dataset[0, 0, 3, 0]  # files are open now
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301  our own bytes
    assert copy.order(0, 0)[:].tolist() == order.tolist()
    assert captions(copy) == captions(dataset)


# ---- index and spool ----


def test_an_index_is_made_once_and_again_when_the_part_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    write = parts._write
    monkeypatch.setattr(parts, "_write", lambda *words: (made.append(words[1].name), write(*words)))
    assert len(slot(root).build()) == len(slot(root).build()) == 20
    assert sorted(made) == [f"part-0000{n}.gz" for n in range(3)]
    before = slot(root).build().fingerprint
    write_part(root / "part-00002.gz", [line("new"), line("newer")])
    dataset = slot(root).build()
    assert (len(dataset), made[3:]) == (21, ["part-00002.gz"]) and dataset.fingerprint != before


@pytest.mark.parametrize("name", ["about.json", "rows.npy", "chunks.npy"])
def test_an_index_that_is_not_whole_is_made_again(root: Path, tmp_path: Path, name: str):
    slot(root).build()
    for path in (tmp_path / "cache").glob(f"part-*/{name}"):
        path.write_bytes(path.read_bytes()[:-20])
    assert captions(slot(root).build()) == EVERY


def test_a_chunk_in_the_spool_that_is_not_whole_or_from_before_a_power_cut_is_made_again(root: Path, tmp_path: Path):
    assert captions(slot(root).build()) == EVERY
    one, other, *_ = sorted((tmp_path / "cache/spool").iterdir())
    one.write_bytes(b"")
    other.write_bytes(bytes(other.stat().st_size))
    os.utime(other, (1, 1))
    assert captions(slot(root).build()) == EVERY


def test_the_fingerprint_does_not_depend_on_where_the_root_is(root: Path):
    before = slot(root).build().fingerprint
    assert slot(root.rename(root.with_name("moved"))).build().fingerprint == before


def test_a_chunk_is_decompressed_once_for_all_processes_and_the_spool_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write_parts(tmp_path / "p", [40])
    unzipped = []
    unzip = part_reading._unzipped
    monkeypatch.setattr(part_reading, "_unzipped", lambda *words: unzipped.append(words[2]) or unzip(*words))
    one, other = slot(root).build(), slot(root).build()
    assert captions(one) == captions(other)
    assert len(unzipped) == len(set(unzipped)) == 10
    spool = tmp_path / "cache/spool"
    size = sum(path.stat().st_size for path in spool.iterdir())
    monkeypatch.setattr(part_reading, "SPOOL_BYTES", size // 3)
    for path in spool.iterdir():
        path.unlink()
    fresh = slot(root).build()
    assert captions(fresh) == captions(one) == captions(slot(root).build())
    assert sum(path.stat().st_size for path in spool.iterdir()) <= size // 3
    assert not list(spool.glob("*.lock")) and not list(spool.glob(".half-*"))


def test_the_order_of_hundreds_of_millions_of_records_is_not_kept_in_memory():
    """Two hundred million in 800,000 chunks: a stretch in the middle of an epoch."""
    chunks = 800_000
    hashes = np.random.default_rng(0).integers(0, 2**63, chunks).astype(np.uint64)
    order = Order(Mixture([Chunks(hashes, np.full(chunks, 256), 0)], [1]), 0, 0)
    here = order[123_456_789 : 123_456_789 + 60]
    assert len(set(here.tolist())) == 60 and 0 <= here.min() <= here.max() < len(order) == 256 * chunks


def test_the_synthetic_pictures_are_the_default(monkeypatch: pytest.MonkeyPatch):
    from data import laion

    monkeypatch.setattr(laion, "DEFAULT", {"train_pictures": 6, "test_pictures": 2})
    whole = Base64Parts(resolution=32)
    train, held_out = whole.build(), whole.held_out().build()
    assert (len(train), len(held_out)) == (6, 2)
    assert train[0, 0, 0, 0]["pixel_values"].shape == (3, 1, 32, 32)
    assert not set(captions(train)) & {""}


def test_a_missing_root_is_named(tmp_path: Path):
    (tmp_path / "laion400m").mkdir()
    with pytest.raises(UserError, match=r"does not exist \(did you mean 'laion400m'\?\)"):
        slot(tmp_path / "laion400").build()
    with pytest.raises(UserError, match=r"no parts \(part-\*.* and no list .* it holds nothing.*data make laion"):
        slot(tmp_path / "laion400m").build()
    with pytest.raises(UserError, match=r"no file in .* is called part-\*\.gz"):
        slot(tmp_path / "laion400m/part-*.gz").build()


def test_a_picture_may_have_any_mode(tmp_path: Path):
    modes = [
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
    ]
    lines = [line(mode, picture(form=form, mode=mode)) for form, mode in modes]
    dataset = slot(write_part(tmp_path / "p/part-0", lines).parent).build()
    for index, (_, mode) in enumerate(modes):
        sample = dataset[0, 0, index, 0]
        assert (sample["caption"], sample["pixel_values"].shape, sample["bad"]) == (mode, (3, 1, SIDE, SIDE), [])
    cmyk = np.asarray(Image.open(io.BytesIO(picture(form="JPEG", mode="CMYK"))).convert("RGB"))
    assert abs(float(dataset[0, 0, 0, 0]["pixel_values"].mean()) - (cmyk.mean() / 127.5 - 1)) < 0.1
