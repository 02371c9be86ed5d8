"""Images and videos of many shapes: from data.txt to samples of their bucket's shape, and every way that goes wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from core.errors import UserError
from core.loader import batches
from core.slots.slot import SlotError, from_json, to_json
from core.verbs.data import _plan
from data.plan.sources import sources
from data.plan.unpickled import unpickled
from data.slots import BucketedVideos, Buckets, Captioning
from registry import get
from tests.data.videos import KINDS, write_video

SIZES = {"a.mp4": (48, 64), "b.mp4": (48, 64), "c.mp4": (64, 48), "d.mp4": (48, 64)}
SMALL = {"num_frames": 9, "min_frames": 5, "max_hxw": 4096, "min_hxw": 256, "hw_stride": 16, "train_fps": 10.0}


class Danger:
    """A pickle of it runs a function."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("it-ran"),)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    for name, (height, width) in SIZES.items():
        write_video(root / name, 20, size=(height, width), options=KINDS["h264.mp4"][2])
    Image.fromarray(np.full((48, 64, 3), 200, np.uint8)).save(root / "e.png")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def record(path: str, **more: Any) -> dict[str, Any]:
    height, width = SIZES.get(path, (48, 64))
    video = {} if path.endswith("png") else {"num_frames": 20, "fps": 10.0}
    return {"path": path, "cap": f"a {path}", "resolution": {"height": height, "width": width}} | video | more


def write(folder: Path, root: Path, records: Any, name: str = "all.json") -> Path:
    """data.txt and one annotation file."""
    file = folder / name
    if name.endswith(".jsonl"):
        file.write_text("\n".join(map(json.dumps, records)))
    elif name.endswith(".pkl"):
        file.write_bytes(pickle.dumps(records))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_text(json.dumps(records))
    (folder / "data.txt").write_text(f"{root}, {name}\n\n")
    return folder / "data.txt"


def slot(folder: Path, root: Path, records: Any, name: str = "all.json", **changes: Any) -> BucketedVideos:
    return BucketedVideos(root=write(folder, root, records, name), **{**SMALL, "drop_short_ratio": 0.0, **changes})


ALL = [record(name) for name in (*SIZES, "e.png")]


@pytest.mark.parametrize("ending", ["json", "jsonl", "pkl", "parquet"])
def test_annotations_of_every_format_give_the_same_plan(ending, tmp_path, template):
    data = slot(tmp_path, template, ALL, f"all.{ending}").build()
    assert dict(zip(map(tuple, data.shapes.tolist()), data.planned.counts.tolist(), strict=True)) == {
        (1, 48, 64): 1,
        (9, 48, 64): 3,
        (9, 64, 48): 1,
    }
    assert sorted(data.ids[n] for n in range(len(data))) == [*SIZES, "e.png"]
    text = "\n".join(data.planned.lines())
    assert "planned: 5 of 5 records (1 images, 4 videos), 3 buckets" in text and "9x48x64" in text


def test_samples_come_in_their_buckets_shape_whatever_the_workers(tmp_path, template):
    scored = [record("a.mp4", cap=["one", "two"], aesthetic=6.5, cut=[4, 17]), *ALL[1:]]
    data = slot(tmp_path, template, scored, buckets=Buckets(remainder="short")).build()
    updates = data.updates(0, 2)
    keys, position = [], (0, 0)
    while position[0] == 0:
        update, position = updates.update(position)
        keys.append(update)
    keys.pop()  # the next epoch's
    plain = list(batches(data, keys, workers=0, pin=False))
    for batch, update in zip(plain, keys, strict=True):
        shape = data.shapes[updates.bucket_of(update)]
        assert list(batch["pixel_values"].shape) == [len(update), 3, *shape]
        assert float(batch["pixel_values"].abs().max()) <= 1.0 + 1e-6
    assert sorted(name for batch in plain for name in batch["id"]) == [
        "a.mp4[4:17]",
        "b.mp4",
        "c.mp4",
        "d.mp4",
        "e.png",
    ]
    captions = {text for batch in plain for text in batch["caption"]}
    assert any("video of high aesthetic quality." in text and ("one" in text or "two" in text) for text in captions)
    again = pickle.loads(pickle.dumps(data))  # noqa: S301
    for batch, update in zip(plain, keys, strict=True):
        assert np.array_equal(again[update[0]]["pixel_values"], batch["pixel_values"][0])


def test_what_a_record_lacks_is_asked_of_the_file(tmp_path, template):
    bare = [{"path": name, "cap": "a clip"} for name in (*SIZES, "e.png")]
    with pytest.raises(UserError, match=r"no bucket has a sample.*5 no resolution.*data\.probe"):
        slot(tmp_path, template, bare).build()
    data = slot(tmp_path, template, bare, probe=True).build()
    assert data.planned.counts.sum() == 5 and [9, 64, 48] in data.shapes.tolist()


def test_a_declared_table_is_read_and_redrawn_each_epoch(tmp_path, template):
    table = tmp_path / "table.py"
    table.write_text('bucket_config = {"48px": {1: (1.0, 4), 9: (0.5, 2)}}\nraise SystemExit("this was run")\n')
    fields = {"declared": table, "batch": "table", "remainder": "short"}
    data = slot(tmp_path, template, ALL, hw_stride=16, buckets=Buckets(**fields)).build()
    assert not data.fixed
    drawn = [data.buckets(0, epoch) for epoch in range(12)]
    assert any((drawn[0] != other).any() for other in drawn) and (data.buckets(0, 3) == drawn[3]).all()
    update, _ = data.updates(0, 8).update((0, 0))
    shape = data.shapes[data.updates(0, 8).bucket_of(update)]
    assert list(data[update[0]]["pixel_values"].shape) == [3, *shape]
    with pytest.raises(UserError, match=r"10 frames at 48px.*take 9"):
        table.write_text('bucket_config = {"48px": {10: (1.0, 2)}}')
        slot(tmp_path, template, ALL, buckets=Buckets(**fields)).build()


def test_held_out_files_are_not_trained_on(tmp_path, template):
    many = [{**record("a.mp4"), "path": f"{n}.mp4", "cut": [0, 10 + m]} for n in range(40) for m in range(2)]
    whole = slot(tmp_path, template, many, held_out_share=0.3)
    train, test = whole.build(), whole.held_out().build()
    names = [{name.partition("[")[0] for name in data.ids[:]} for data in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 40 and len(train) + len(test) == 80


def test_the_verb_prints_the_table(tmp_path, template, capsys):

    bad = [*ALL, record("f.mp4", num_frames=3), record("g.gif")]
    recipe = get("lvdm-text2video-tiny").but(data=slot(tmp_path, template, bad))
    assert _plan(recipe) == 0
    said = capsys.readouterr().out
    assert "planned: 5 of 7 records" in said and "an epoch: " in said
    assert "1  too short, the first: f.mp4; set by data.num_frames, data.min_frames and data.drop_short_ratio" in said
    assert "neither an image nor a video by its ending, the first: g.gif" in said


# ---- bad input ----


@pytest.mark.parametrize("line", ["here", "here,all.json,there", ",all.json", "nowhere,all.json", "ROOT,all.csv"])
def test_a_line_of_data_txt_that_is_not_two_parts_names_the_line(line, tmp_path, template):
    file = write(tmp_path, template, ALL)
    file.write_text(f"{template},all.json\n\n{line.replace('ROOT', str(template))}\n")
    with pytest.raises(UserError, match=r"data\.txt, line 3: "):
        sources(file)


def test_an_annotation_without_records_is_refused_by_name(tmp_path, template):
    with pytest.raises(UserError, match=r"all\.json has no records"):
        slot(tmp_path, template, []).build()
    with pytest.raises(UserError, match=r"holds a dict; expected a list"):
        slot(tmp_path, template, {"a": 1}).build()


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, template):
    for records in ([Danger()], [{"path": Danger()}], {"x": {(("a",),): 1}}):
        with pytest.raises(UserError, match="Nothing of it was run"):
            slot(tmp_path, template, records, "all.pkl").build()
    assert not (tmp_path / "it-ran").exists()
    file = tmp_path / "broken.pkl"
    for content in (b"", b"\x80\x05", b"r\xff\xff\xff\x7f.", pickle.dumps(ALL)[:-30]):
        file.write_bytes(content)
        with pytest.raises(UserError):
            unpickled(file)


def test_fields_of_wrong_types_are_missing_ones(tmp_path, template):
    odd = [*ALL, record("b.mp4", num_frames="many"), record("b.mp4", resolution=[1, 2]), 7, record("b.mp4", cap=3)]
    data = slot(tmp_path, template, odd).build()
    assert {name: count for name, (count, _) in data.planned.about["dropped"].items()} == {
        "no_num_frames": 1,
        "no_resolution": 1,
        "no_path": 1,
        "no_cap": 1,
    }


def test_a_file_that_is_gone_or_shorter_than_its_record_is_replaced_within_the_bucket(tmp_path, template):
    gone = [
        record("gone.mp4"),
        record("b.mp4"),
        record("d.mp4"),
        record("c.mp4"),
        record("a.mp4", num_frames=400, cut=[15, 400]),
    ]
    data = slot(tmp_path, template, gone, too_long=None).build()
    assert len(data) == 5
    for number in range(5):
        sample = data[0, 0, number, 0]
        name = data.ids[number]
        if name == "gone.mp4":
            assert sample["bad"][0] == ("gone.mp4", "does not exist")
        assert sample["bucket"] == ("9x64x48" if name == "c.mp4" else "9x48x64")
    assert data[0, 0, data.ids[:].index("a.mp4[15:400]"), 0]["bad"][0] == (
        "a.mp4",
        "has 5 frames after resampling, and 9 were planned",
    )


def test_a_bucket_whose_files_are_all_bad_ends_with_their_names(tmp_path, template):
    data = slot(tmp_path, template, [record("a.mp4"), *(record(f"{n}.png", cap="") for n in range(3))]).build()
    number = data.ids[:].index("0.png")
    with pytest.raises(UserError, match=r"samples in a row cannot be read.*does not exist"):
        data[0, 0, number, 0]


def test_a_size_that_is_not_the_files_is_a_bad_sample(tmp_path, template):
    wrong = [record("a.mp4", resolution={"height": 96, "width": 128}), record("b.mp4", crop=[0, 32, 16, 48])]
    data = slot(tmp_path, template, wrong).build()
    by_name = {name: data[0, 0, n, 0] for n, name in enumerate(data.ids[:]) if name == "b.mp4"}
    assert list(by_name["b.mp4"]["pixel_values"].shape) == [3, 9, 32, 32]
    with pytest.raises(UserError, match=r"is \[48, 64\], and the annotation says \[96, 128\]"):
        data[0, 0, data.ids[:].index("a.mp4"), 0]


def test_a_bucket_plan_without_a_sample_names_what_to_change(tmp_path, template):
    with pytest.raises(UserError, match=r"all 5 records were dropped.*5 too few pixels.*change data\.min_hxw"):
        slot(tmp_path, template, ALL, max_hxw=10**6, min_hxw=10**5).build()
    with pytest.raises(UserError, match=r"data\.buckets\.remainder"):
        slot(tmp_path, template, ALL, buckets=Buckets(remainder="drop")).build().updates(0, 64)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_frames": 10}, "must be 4 k . 1"),
        ({"speed_factor": 0.5}, "never slowed down"),
        ({"force_resolution": True}, "needs max_height and max_width"),
        ({"min_height": 64, "max_height": 32}, "is above max_height"),
        ({"compat": "osp-1.3", "max_hxw": None}, "compat needs"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_field(fields, said):
    with pytest.raises(SlotError, match=said):
        BucketedVideos(**fields)


def test_the_slots_go_to_json_and_back():
    whole = BucketedVideos(
        root=Path("x"), captioning=Captioning(dropout=0.1), buckets=Buckets(sizes=("*=4",), batch="table")
    )
    assert from_json(BucketedVideos, to_json(whole), "data") == whole
    assert Captioning().prompt("A Dog <b>runs</b>") == "a dog runs"
