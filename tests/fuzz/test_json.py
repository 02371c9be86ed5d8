"""Every JSON file that is read: recipe.json, run.json, state.json, manifest.json, config.json."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import checkpoint, manifest
from core.errors import UserError
from core.recipe_file import dump, read
from core.run_facts import run_facts
from core.weights.stored import read_json
from registry import get
from tests.fuzz.hostile import altered, bounded, changed, keeping, kept, outcome, untouched

STATE = {
    "format": 1,
    "step": 6,
    "epoch": 1,
    "drawn": 3,
    "nonfinite": [1, 0],
    "samples": [24, 2],
    "scaler": [1.0, 0],
    "ema_count": 6,
    "optimizer_steps": {"unet.a.weight": 6.0, "unet.a.bias": 6.0},
    "threads": 2,
    "world": 1,
    "window": {"updates": 2, "seconds": 0.4, "data_s": 0.1, "skipped": 0, "sums": {"loss": 1.5}, "counted": 2},
}
MANIFEST = {"files": {"state.json": {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}}}  # fmt: skip
FACTS = {"run_id": "0123456789abcdef", "store": "sqlite:///runs/mlflow.db", "run_name": "20270101-000000-1234"}
CONFIG = {"_class_name": "LVDMUNet", "model_channels": 32, "scale_factor": 0.3, "shift_factor": [0.1, 0.2]}
READERS = {
    "recipe.json": (json.loads(dump(get("lvdm-short-sky-tiny"))), lambda folder: read(folder)),
    "state.json": (STATE, checkpoint.numbers_of),
    "manifest.json": (MANIFEST, manifest.damage),
    "run.json": (FACTS, run_facts),
    "config.json": (CONFIG, lambda folder: read_json(folder / "config.json")),
}


def attempt(name: str, content: bytes):
    """What a reader makes of a file with this content."""
    with tempfile.TemporaryDirectory() as around, keeping(name, content):
        folder = Path(around) / "folder"
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        (folder / name).write_bytes(content)
        with untouched(Path(around)):
            return outcome(lambda: READERS[name][1](folder))


@pytest.mark.parametrize("name", READERS)
def test_the_file_that_is_changed_below_is_read(name):
    found = attempt(name, json.dumps(READERS[name][0]).encode())
    assert not isinstance(found, UserError), found


@pytest.mark.parametrize("name", READERS)
@bounded(70)
@given(data=st.data())
def test_a_file_of_which_parts_are_something_else_is_read_or_refused_in_a_line(name, data):
    attempt(name, data.draw(altered(READERS[name][0])))


@pytest.mark.parametrize("name", READERS)
@bounded(50)
@given(data=st.data())
def test_a_file_whose_bytes_were_changed_is_read_or_refused_in_a_line(name, data):
    attempt(name, data.draw(changed([json.dumps(READERS[name][0]).encode()])))


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"9" * 5000, b"\xff\xfe{}", b"null", b'"x"', b"NaN", b"[]"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_object_at_all_is_refused_by_all_of_them(name, content):
    attempt(name, content)


@pytest.mark.parametrize(
    "path", [path for name in READERS for path in kept(name)], ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_what_failed_once_is_read_or_refused_in_a_line(path):
    attempt(path.parent.name, path.read_bytes())


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "loop"])
def test_what_is_no_ordinary_file_is_not_waited_for(name, kind, tmp_path):
    path = tmp_path / name
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "endless": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    outcome(lambda: READERS[name][1](tmp_path))


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_many_gigabytes_is_not_read(name, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no room
    outcome(lambda: READERS[name][1](tmp_path))
