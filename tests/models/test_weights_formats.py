"""Checkpoints as others' frameworks leave them: classes in the pickle, prefixes, moving averages, folders, wrong downloads."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import UserError
from core.weights.fit import in_layout_of, load_strict
from core.weights.folder import write_weights
from core.weights.lazy import lazily, safetensors
from core.weights.load import load_component, read_component
from core.weights.names import component, sort_out
from core.weights.stored import open_stored
from core.weights.torch_file import read_torch


def _values(state):
    return {name: entry.read() for name, entry in state.items()}


def _equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


# --------------------------------------------------------------------------------------------- classes in checkpoints


@pytest.fixture
def lightning(monkeypatch):
    """Classes as Lightning and OmegaConf have them, under their module names, for as long as a file is written."""
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    class ModelCheckpoint:
        def __init__(self):
            self.monitor = "val/loss"

    class DictConfig(dict):
        def __init__(self, content):
            super().__init__(content)
            self.flags = {"readonly": None}

    for kind, module in ((ModelCheckpoint, "pytorch_lightning.callbacks"), (DictConfig, "omegaconf.dictconfig")):
        kind.__module__, kind.__qualname__ = module, kind.__name__
        setattr(sys.modules[module], kind.__name__, kind)
    return ModelCheckpoint, DictConfig


def _tensors():
    torch.manual_seed(0)
    whole = torch.randn(6, 5)
    return {
        "model.diffusion_model.a": torch.randn(3, 4),
        "model.diffusion_model.transposed": whole.T,
        "model.diffusion_model.part": whole[2:4, 1:],
        "model.diffusion_model.half": torch.randn(7).half(),
        "model.diffusion_model.brain": torch.randn(2, 2).bfloat16(),
        "model.diffusion_model.parameter": nn.Parameter(torch.randn(2)),
        "model.diffusion_model.number": torch.tensor(7),
        "model.diffusion_model.flag": torch.tensor([True, False]),
        "model.diffusion_model.empty": torch.zeros(0, 3),
        "betas": torch.zeros(1000),
    }


def _with_classes(lightning):
    checkpoint, config = lightning
    return {
        "epoch": 3,
        "state_dict": _tensors(),
        "callbacks": {checkpoint: {"best_model_score": torch.ones(())}, "other": checkpoint()},
        "hyper_parameters": config({"lr": 1e-4, "args": argparse.Namespace(a=1), "path": Path("x")}),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }


def test_a_checkpoint_with_classes_gives_its_tensors_and_makes_none_of_the_classes(lightning, tmp_path):
    torch.save(_with_classes(lightning), tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError):  # torch refuses it, so this is the other way
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    state, passed_over = read_torch(tmp_path / "a.ckpt")
    torch.save({"state_dict": _tensors()}, tmp_path / "plain.ckpt")
    plain, none = read_torch(tmp_path / "plain.ckpt")
    assert none == [] and {"omegaconf.dictconfig.DictConfig", "pytorch_lightning.callbacks.ModelCheckpoint"} <= {
        *passed_over
    }
    _equal({n: t for n, t in _values(state).items() if n.startswith("state_dict.")}, _values(plain))
    assert all(entry.dtype == entry.read().dtype and entry.shape == entry.read().shape for entry in state.values())
    inner = component(sort_out(state), "unet", averaged=False)
    assert inner.keys() == {n.removeprefix("model.diffusion_model.") for n in _tensors()} - {"betas"}


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_an_attack_beside_harmless_classes_is_refused_and_not_executed(lightning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(_with_classes(lightning) | {"loops": _Attack()}, "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt: refused, it asks for posix\.mkdir"):
        read_torch(tmp_path / "evil.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]


def _rezipped(source, target, change):
    """The archive with the bytes of one record changed, or left out for None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)


def _shorter(name, data):
    return data[: len(data) // 2] if name.endswith("/data/0") else data


@pytest.mark.parametrize(
    "change",
    [_shorter, lambda n, d: None if n.endswith("/data/0") else d, lambda n, d: d[:-20] if n.endswith(".pkl") else d],
    ids=["a short record", "a lost record", "a torn pickle"],
)
def test_a_damaged_archive_is_one_line(lightning, tmp_path, change):
    torch.save(_with_classes(lightning), tmp_path / "a.ckpt")
    _rezipped(tmp_path / "a.ckpt", tmp_path / "b.ckpt", change)
    with pytest.raises(UserError, match=r"b\.ckpt: cannot be read as a torch checkpoint \([^\n]*$"):
        read_torch(tmp_path / "b.ckpt")


def test_the_format_before_1_6_is_read_without_classes_and_refused_with_them(lightning, tmp_path):
    torch.save({"state_dict": _tensors()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": _tensors()}, tmp_path / "b.pth")
    _equal(_values(read_torch(tmp_path / "a.pth")[0]), _values(read_torch(tmp_path / "b.pth")[0]))
    torch.save(_with_classes(lightning), tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"c\.pth: not opened.*save it again with a newer one"):
        read_torch(tmp_path / "c.pth")


# ------------------------------------------------------------------------------------------------------------ prefixes

UNET = {"time_embed.0.weight": torch.ones(2, 2), "out.2.bias": torch.ones(1) * 3}


def _prefixed(*prefixes, more=None):
    return {"".join(prefixes) + name: t for name, t in UNET.items()} | (more or {})


@pytest.mark.parametrize(
    "tensors",
    [
        _prefixed("module."),
        _prefixed("_orig_mod."),
        _prefixed("module.", "_orig_mod."),
        _prefixed("model.diffusion_model.", more={"first_stage_model.x.weight": torch.ones(1), "betas": torch.ones(9)}),
        _prefixed("module.", "model.diffusion_model.", more={"module.cond_stage_model.x.weight": torch.ones(1)}),
        _prefixed("model.diffusion_model._orig_mod.", more={"first_stage_model.x.weight": torch.ones(1)}),
        _prefixed("model.diffusion_model.module.", more={"first_stage_model.x.weight": torch.ones(1)}),
        _prefixed("unet.", more={"vae.x.weight": torch.ones(1), "text_encoder.x.weight": torch.ones(1)}),
        _prefixed("state_dict.", "unet.", more={"optimizer.state.0.exp_avg": torch.ones(3)}),
        _prefixed("model.", more={"optimizer.0.exp_avg": torch.ones(3), "ema.out.2.bias": torch.ones(1)}),
        {
            "time_embed._checkpoint_wrapped_module.0.weight": UNET["time_embed.0.weight"],
            "out.2.bias": UNET["out.2.bias"],
        },
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_what_frameworks_put_before_names_is_taken_off(tensors):
    _equal(component(sort_out(tensors), "unet", averaged=False, own=UNET), UNET)


def test_a_name_that_the_network_has_itself_is_left_alone():
    own = {"model.layers.0.weight": torch.ones(1), "model.norm.weight": torch.ones(1)}
    _equal(component(sort_out(own, own), "text_encoder", averaged=False, own=own), own)
    _equal(
        component(sort_out(own), "text_encoder", averaged=False), {n.removeprefix("model."): t for n, t in own.items()}
    )


@pytest.mark.parametrize(
    "prefix",
    ["model_ema.diffusion_model", "model_ema.", "ema.unet.", "ema_model.", "model_ema.model.diffusion_model."],
)
def test_a_moving_average_is_found_squashed_or_not(prefix):
    squashed = prefix.startswith("model_ema.") and prefix.count(".") == 1
    average = {prefix + (n.replace(".", "") if squashed else n): t + 1 for n, t in UNET.items()}
    raw = _prefixed("model.diffusion_model.", more={"first_stage_model.x.weight": torch.ones(1)})
    full = sort_out(raw | average | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())})
    _equal(component(full, "unet", averaged=True), {name: t + 1 for name, t in UNET.items()})
    _equal(component(full, "unet", averaged=False), UNET)
    # a file of the average alone: without dots names are found through those of the network
    _equal(component(sort_out(average), "unet", averaged=True, own=UNET), {name: t + 1 for name, t in UNET.items()})


# -------------------------------------------------------------------------------------------------- files and folders


def test_written_weights_are_what_safetensors_reads_in_every_dtype(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]
    state = {f"x{i}": (torch.randn(3, i + 1) * 9).to(dtype) for i, dtype in enumerate(dtypes)}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "strided": torch.randn(4, 6).T[1:3]}
    path = write_weights(tmp_path, state)
    _equal(load_file(path), state)
    _equal(_values(safetensors(path)), state)
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "theirs.safetensors")
    _equal(_values(open_stored(tmp_path / "theirs.safetensors").tensors), state)
    header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
    sizes = {name: state[name].element_size() for name in state}
    assert all(header[name]["data_offsets"][0] % size == 0 for name, size in sizes.items()), "not aligned"
    assert path.stat().st_mode & 0o777 == 0o644 and [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_sharded_folders_are_put_together_and_may_not_leave_their_folder(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    _equal(_values(open_stored(tmp_path).tensors), {"a": torch.ones(2), "b": torch.ones(3)})
    for outside in ("../secret.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": names | {"b": outside}}))
        with pytest.raises(UserError, match="refused, it names"):
            open_stored(tmp_path)
    index.write_text(json.dumps({"weight_map": names | {"c": names["a"]}}))
    with pytest.raises(UserError, match=r"1 tensors are in none of its files, e\.g\. c"):
        open_stored(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page, not weights"),
        (b"", "cannot be read"),
        (b"hello", "cannot be read|not opened"),
    ],
)
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_wrong_download_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        open_stored(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_with_several_files_asks_which(tmp_path):
    for name in ("ae_sky.safetensors", "ae_taichi.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UserError, match=r"name one: ae_sky\.safetensors, ae_taichi\.safetensors"):
        open_stored(tmp_path)
    (tmp_path / "ae_taichi.safetensors").unlink()
    assert open_stored(tmp_path).path.name == "ae_sky.safetensors"


# ------------------------------------------------------------------------------------------------------ into a module


def test_a_matrix_and_a_kernel_of_one_by_one_are_the_same_layer():
    for module, shape in ((nn.Linear(3, 4), (4, 3, 1, 1)), (nn.Conv2d(3, 4, 1), (4, 3)), (nn.Conv1d(3, 4, 1), (4, 3))):
        weight = torch.randn(shape)
        state = in_layout_of(module, lazily({"weight": weight, "bias": torch.zeros(4)}))
        load_strict(module, state)
        assert torch.equal(module.weight.flatten(), weight.flatten())
    with pytest.raises(UserError, match="misshapen"):
        load_strict(
            nn.Linear(3, 4), in_layout_of(nn.Linear(3, 4), lazily({"weight": torch.ones(3, 4), "bias": torch.ones(4)}))
        )


def test_a_module_on_the_meta_device_takes_the_tensors(tmp_path):
    filled = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    torch.save({"module." + name: t for name, t in filled.state_dict().items()}, tmp_path / "a.pt")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    load_component(empty, str(tmp_path / "a.pt"), "net")
    _equal(empty.state_dict(), filled.state_dict())
    assert all(isinstance(p, nn.Parameter) for p in empty.parameters())
    lazy, config = read_component(str(tmp_path / "a.pt"), "net", empty)
    _equal(_values(lazy), filled.state_dict())
    assert config == {}


def test_a_hub_id_without_a_network_gives_the_command_that_fetches_it(tmp_path):
    code = "from core.weights.load import locate; locate('Yingqing/LVDM/lvdm_short/short_sky.ckpt', 'unet')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2]
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "hf download Yingqing/LVDM lvdm_short/short_sky.ckpt --local-dir weights/LVDM" in last
    assert "then name weights/LVDM/lvdm_short/short_sky.ckpt" in last
