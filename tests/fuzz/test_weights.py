"""Weights from anywhere: safetensors, torch checkpoints with pickles in them, and the shards of a checkpoint."""

import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from core import checkpoint, manifest
from core.distributed import Ranks
from core.errors import UserError
from core.saver import Saver
from core.weights.load import load_component
from core.weights.lvdm import load_strict, original_state
from tests.fuzz.hostile import bounded, changed, keeping, kept, outcome, untouched

HERE = Ranks(torch.device("cpu"), 0, 1, None)
NET = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
WHOLE = save(NET.state_dict(), metadata={"format": "pt"})


def torch_file(value, legacy=False):
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


PICKLED = [torch_file({"state_dict": NET.state_dict()}, legacy) for legacy in (False, True)]


def attempt(reader, content):
    with tempfile.TemporaryDirectory() as around, keeping(reader, content):
        folder = Path(around) / "weights"
        folder.mkdir()
        path = folder / ("weights.safetensors" if reader == "safetensors" else "weights.ckpt")
        path.write_bytes(content)
        with untouched(Path(around)):
            if reader == "safetensors":
                return outcome(
                    lambda: load_component(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), str(folder), "net")
                )
            return outcome(
                lambda: load_strict(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), original_state(path, "vae"))
            )


@bounded(150)
@given(changed([WHOLE]))
def test_a_changed_safetensors_file_is_read_or_refused_in_a_line(content):
    attempt("safetensors", content)


@bounded(100)
@given(changed(PICKLED))
def test_a_changed_torch_checkpoint_is_read_or_refused_in_a_line(content):
    attempt("torch", content)


@pytest.mark.parametrize(
    "content", [torch_file(value) for value in (3, [1], None, {"state_dict": 3}, {1: torch.ones(2)})]
)
def test_a_torch_file_that_is_no_checkpoint_is_refused_in_a_line(content):
    assert isinstance(attempt("torch", content), UserError)


@pytest.mark.parametrize("reader", ["safetensors", "torch"])
def test_what_failed_once_is_read_or_refused_in_a_line(reader):
    assert isinstance(attempt(reader, {"safetensors": WHOLE, "torch": PICKLED[0]}[reader]), (dict, type(None)))
    for path in kept(reader):
        attempt(reader, path.read_bytes())


class Command:
    """A pickle that runs a command in whoever loads it carelessly."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_command_in_a_pickle_is_not_run(legacy, tmp_path):
    content = torch_file({"state_dict": {"a": Command(tmp_path / "proof")}}, legacy)
    assert isinstance(attempt("torch", content), UserError) and not (tmp_path / "proof").exists()
    bare = pickle.dumps(Command(tmp_path / "proof"))
    assert isinstance(attempt("torch", bare), UserError) and not (tmp_path / "proof").exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "proof").exists()  # it would have


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_opened():
    file = io.BytesIO(PICKLED[0])
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content + bytes(2**24) * name.endswith("data.pkl"))
    assert len(bomb.getvalue()) < 2**20
    assert "parts are larger than the file" in str(attempt("torch", bomb.getvalue()))


# -------------------------------------------------------------------------------------------------- of a checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A real checkpoint of a tiny network."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saver = Saver(folder, HERE, None, lambda path, step, about: None)
    saver.save(checkpoint.tensors(nn.ModuleDict({"net": NET}), None, None), {"step": 1}, "{}")
    saver.join()
    assert saver.failure() is None
    return folder / "step-00000001"


def fill(folder):
    state = {
        name: torch.full_like(t, torch.nan)
        for name, t in checkpoint.tensors(nn.ModuleDict({"net": NET}), None, None).items()
    }
    checkpoint.load(folder, state, HERE)
    return state


def load_shard(whole, content):
    """Load a checkpoint whose shard is this; the manifest fits it, as that of someone who means harm would."""
    with tempfile.TemporaryDirectory() as around, keeping("shard", content):
        folder = Path(around) / "checkpoints" / whole.name
        shutil.copytree(whole, folder)
        next(folder.glob("*.safetensors")).write_bytes(content)
        manifest.write(folder, manifest.digests(folder))
        with untouched(Path(around)):
            found, damaged = checkpoint.newest(folder.parent)
            assert (found, damaged) == (folder, [])
            return outcome(lambda: fill(folder))


def shard_of(whole):
    return next(whole.glob("*.safetensors")).read_bytes()


@pytest.fixture(scope="module")
def shard(whole):
    return shard_of(whole)


@bounded(60)
@given(data=st.data())
def test_a_checkpoint_with_a_changed_shard_is_loaded_or_refused_in_a_line(whole, shard, data):
    found = load_shard(whole, data.draw(changed([shard])))
    assert isinstance(found, UserError) or not any(t.isnan().all() for t in found.values())


def with_offsets(shard, change):
    """The shard with another account of where its tensors belong."""
    size = int.from_bytes(shard[:8], "little")
    header = json.loads(shard[8 : 8 + size])
    info = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    header["__metadata__"]["DCP_SHARDING_INFO"] = change if isinstance(change, str) else json.dumps(change(info))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + shard[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda info: {name: {"saved_offsets": [2**40] * len(each["saved_offsets"])} for name, each in info.items()},
        lambda info: {name: {"saved_offsets": [1] * len(each["saved_offsets"])} for name, each in info.items()},
        lambda info: {name: {"saved_offsets": [-1] * len(each["saved_offsets"])} for name, each in info.items()},
        lambda info: {name: {"saved_offsets": []} for name in info},
        lambda info: {name: {"saved_offsets": "../.."} for name in info},
        lambda info: {},
        lambda info: [],
        lambda info: 3,
        "[" * 100_000,
        "{",
    ],
)
def test_a_shard_that_lies_about_where_it_belongs_is_refused_in_a_line(whole, shard, change):
    assert isinstance(load_shard(whole, with_offsets(shard, change)), UserError)


def test_a_checkpoint_that_lacks_a_part_of_a_tensor_is_refused(whole, shard, tmp_path):
    """All names are there, and the size: the last row says where the tensor ends."""
    state = fill(whole)
    info = {name: {"saved_offsets": [0] * t.dim()} for name, t in state.items()}
    folder = tmp_path / whole.name
    shutil.copytree(whole, folder)
    name = next(name for name, t in state.items() if t.dim() == 2)
    info[name] = {"saved_offsets": [state[name].shape[0] - 1, 0]}
    meta = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}
    save_file(state | {name: state[name][-1:].clone()}, next(folder.glob("*.safetensors")), metadata=meta)
    with pytest.raises(UserError, match=r"does not fit this recipe, or is damaged: a part of .* is missing"):
        fill(folder)


def test_what_failed_once_in_a_checkpoint_is_loaded_or_refused_in_a_line(whole):
    for path in kept("shard"):
        load_shard(whole, path.read_bytes())
