"""Open-Sora-Plan v1.3.1's data set, record by record: what is kept, in which shape, which frames; captions; resize."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from data.bucketed import shaped
from data.plan import declared
from data.plan.captions import cleaned
from data.plan.frames import NoClip, clip_of, indices
from data.plan.rules import REASONS, Planner, legal
from data.plan.sources import batch_of
from data.slots import BucketedVideos
from tests.parity.recorded import GOLDEN

FOLDER = GOLDEN / "opensora-plan-dataset"
PLAN = json.loads((FOLDER / "plan.json").read_text())
FAILS = {"KeyError": "has no fps", "ValueError": "were planned", "IndexError": "is read with"}
WORKED = {  # source height and width → sheet §4.3: A, B, C
    (512, 683): ((416, 544), (416, 576), True),
    (1080, 1920): ((352, 640), (384, 672), True),
    (1920, 1080): ((640, 352), (672, 384), False),
    (240, 426): ("res_too_small", (224, 416), True),
    (1000, 2000): ("aspect_mismatch", (352, 704), None),
    (255, 257): ("res_too_small", "res_too_small", None),
    (1100, 1000): (None, None, True),
    (1101, 1000): (None, None, False),
    (275, 1000): (None, None, True),
    (274, 1000): (None, None, False),
}


class Edge:
    """A generator whose every draw is the first number, or the last."""

    def __init__(self, last: bool) -> None:
        self.last = last

    def integers(self, low: int, high: int) -> int:
        return high - 1 if self.last else low


def slot_of(arguments: dict[str, Any], **more: Any) -> BucketedVideos:
    """The slot for the trainer's arguments."""
    ours = {"sp_size": "sequence", "ae_stride_t": "time_stride"}
    fields = {ours.get(k, k): v for k, v in arguments.items() if k != "total_batch_size"}
    return BucketedVideos(compat="osp-1.3", **fields, **more)


def planned(records: list[dict[str, Any]], slot: BucketedVideos) -> list[tuple[Any, ...]]:
    """Reason, frames, height, width of each record."""
    batch = batch_of(0, records)
    found = Planner(slot).shapes(batch, np.arange(len(records), dtype=np.uint64))
    names = list(REASONS)
    columns = (found.frames.tolist(), found.height.tolist(), found.width.tolist())
    return [(names[r], *row) for r, *row in zip(found.reason.tolist(), *columns, strict=True)]


def read(record: dict[str, Any], frames: int, slot: BucketedVideos, last: bool) -> int | str:
    """A checksum of the frames, or why there are none."""
    clip = clip_of(record.get("cut"), record["num_frames"], record.get("fps"), True)
    try:
        return zlib.crc32(json.dumps(indices(clip, frames, slot, Edge(last)).tolist()).encode())  # type: ignore[arg-type]
    except NoClip as fault:
        return str(fault)


@pytest.mark.parametrize("name", PLAN["settings"])
def test_each_record_is_kept_dropped_shaped_and_read_as_by_the_original(name):
    slot = slot_of(PLAN["settings"][name]["arguments"])
    rows, found = PLAN["settings"][name]["rows"], planned(PLAN["records"], slot)
    for record, row, (reason, *shape) in zip(PLAN["records"], rows, found, strict=True):
        status = PLAN["statuses"][row[0]]
        assert reason == status or (reason, status) == ("kept", "minority"), record
        if reason != "kept":
            continue
        assert shape == row[1:4], record
        for last, wanted in enumerate(row[10:]):
            got = read(record, shape[0], slot, bool(last))
            assert got == wanted if isinstance(wanted, int) else FAILS[wanted] in str(got), record


@pytest.mark.parametrize("source", WORKED)
def test_the_worked_sizes_of_the_sheet(source):
    record = {"path": "a.jpg", "cap": "", "resolution": {"height": source[0], "width": source[1]}}
    area = [{"max_hxw": 236544, "min_hxw": 102400}, {"max_hxw": 262144, "min_hxw": 65536}]
    for settings, wanted in zip(area, WORKED[source], strict=False):
        if wanted is not None:
            ((reason, _, *sides),) = planned([record], slot_of({"num_frames": 93, "hw_stride": 32, **settings}))
            assert (reason if isinstance(wanted, str) else tuple(sides)) == wanted
    if WORKED[source][2] is not None:
        fixed = {"num_frames": 93, "force_resolution": True, "max_height": 352, "max_width": 640}
        ((reason, *_),) = planned([record], slot_of(fixed))
        assert reason == ("kept" if WORKED[source][2] else "aspect_mismatch")


def test_lengths_that_the_autoencoder_and_the_groups_can_split():
    cases = {  # stride, group → frames: length (sheet §13 F4)
        (4, 1): {28: 0, 29: 29, 32: 29, 33: 33, 96: 93, 97: 97},
        (4, 2): {33: 29, 37: 37, 45: 45},
        (4, 4): {44: 29, 45: 45},
        (4, 8): {60: 29, 61: 61, 92: 61, 93: 93, 124: 93, 125: 125},
        (8, 1): {32: 0, 33: 33, 93: 89, 29: 0},
    }
    for (stride, group), lengths in cases.items():
        slot = BucketedVideos(compat="osp-1.3", max_hxw=1, num_frames=65, time_stride=stride, sequence=group)
        assert legal(np.array(list(lengths)), slot).tolist() == list(lengths.values())


def test_the_default_mends_what_the_sheet_lists():
    wide = {"path": "a.PNG", "cap": "", "resolution": {"height": 1000, "width": 2000}}
    slot = BucketedVideos(num_frames=93, max_hxw=236544, min_hxw=102400, drop_short_ratio=0.0, speed_factor=1.25)
    assert planned([wide], slot) == [("kept", 1, 320, 672)]  # the aspect is tested before the rounding
    clip = {"path": "a.mp4", "cap": "", "resolution": {"height": 480, "width": 640}, "num_frames": 106, "fps": 24}
    cases = (
        (clip, ("kept", 93, 416, 544)),
        (clip | {"cut": [10, 50]}, ("kept", 37, 416, 544)),  # the cut's end counts
        (clip | {"crop": [0, 320, 0, 320], "num_frames": None, "cut": [0, 93]}, ("kept", 93, 320, 320)),
        (clip | {"num_frames": 20}, ("too_short", 0, 0, 0)),
        (clip | {"cut": [-3, 50]}, ("bad_cut", 0, 0, 0)),
        (clip | {"crop": [0, 641, 0, 480]}, ("bad_crop", 0, 0, 0)),
        (clip | {"crop": "left"}, ("bad_crop", 0, 0, 0)),
        (clip | {"num_frames": None}, ("no_num_frames", 0, 0, 0)),
        (clip | {"path": "../a.mp4"}, ("path_leaves_root", 0, 0, 0)),
        ({"cap": ""}, ("no_path", 0, 0, 0)),
    )
    assert planned([record for record, _ in cases], slot) == [wanted for _, wanted in cases]
    seen = set()
    for number in range(400):  # 94 frames leave two windows of 93, and 106 are thinned out to exactly 93
        frames = indices(clip_of(None, 94, 24, False), 93, slot.but(speed_factor=1.0), np.random.default_rng(number))
        seen.add(int(frames[0]))
    assert seen == {0, 1}
    assert len(indices(clip_of(None, 106, 24, False), 93, slot, np.random.default_rng(0))) == 93
    with pytest.raises(NoClip):
        indices(
            clip_of(None, 106, 24, True),
            93,
            slot_of({"num_frames": 93, "max_hxw": 1, "speed_factor": 1.25}),
            Edge(True),
        )  # type: ignore[arg-type]


def test_short_clips_are_dropped_by_the_originals_draws():
    clips = [{"path": "a.mp4", "cap": "", "resolution": {"height": 480, "width": 640}, "num_frames": 60, "fps": 24}]
    slot = slot_of({"num_frames": 93, "max_hxw": 236544, "drop_short_ratio": 0.5})
    assert sum(row[0] == "kept" for row in planned(clips * 1000, slot)) == 476


def test_captions_are_cleaned_as_by_the_original():
    for case in json.loads((FOLDER / "captions.json").read_text()):
        text = case["caption"]
        for kind, chinese in (("mt5", True), ("other", False)):
            assert cleaned(text, chinese) == case[f"{kind}_plain"]
            assert cleaned(str([text]), chinese) == case[f"{kind}_as_trained"]


def test_pixels_are_resized_and_cropped_as_by_the_original():
    tensors = recorded_tensors()
    area = slot_of({"num_frames": 1, "max_hxw": 1200, "hw_stride": 8})
    fixed = slot_of({"num_frames": 1, "force_resolution": True, "max_height": 24, "max_width": 40})
    for clip, slot in (("clip0", area), ("clip3", fixed)):
        frames = tensors["input." + clip].permute(0, 2, 3, 1).numpy()  # (T, h, w, 3)
        wanted = tensors["output." + clip].transpose(0, 1)  # (3, T, H, W)
        found = shaped(frames, np.array([len(frames), 24, 40]), slot)
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=2e-6)


def recorded_tensors() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(FOLDER / "tensors.safetensors")


CASES = json.loads((GOLDEN / "hpcai-buckets" / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['version']} {case['name']}")
def test_a_declared_table_places_samples_as_the_second_project_does(case):
    table = declared.table(case["bucket_config"], case["version"])
    samples = np.array([[*row[0], 0][:4] for row in case["cases"]], float)
    frames, seeds = samples[:, 0].astype(int), [row[1] for row in case["cases"]]
    if case["version"] == "2.0":
        frames = declared.sampled(frames, samples[:, 3], case["fps_max"])
    first = {(name, length): number for name, length, number in case["first_draw"]}
    generators = [np.random.default_rng(seed) for seed in seeds]

    def chance(rows: np.ndarray, number: int, which: int) -> np.ndarray:
        if case["version"] == "2.0":
            return np.array([generators[row].random() for row in rows])
        cell = table.cells[number]
        own = first[cell.resolution, cell.frames]
        return np.array([np.random.default_rng(seeds[row] + own).random(2)[which] for row in rows])

    found = declared.place(table, declared.Clips(frames, samples[:, 1], samples[:, 2]), case["interval"], chance)
    shapes, batches = table.buckets().tolist(), table.batches()
    got = [(None, None) if bucket < 0 else (shapes[bucket], batches[bucket]) for bucket in found.tolist()]
    assert got == [(row[2], row[3]) for row in case["cases"]]
