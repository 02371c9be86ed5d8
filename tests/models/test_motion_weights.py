"""Motion modules in every layout that is about: each is opened by the stock pipeline and gives the same frames."""

import json
import os

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file, save_file

import registry
from core.errors import UserError
from core.verbs.weights import describe
from core.weights.adapters import open_adapter, taken_from, write_layout
from core.weights.fit import in_layout_of, load_strict
from core.weights.importer import import_weights
from core.weights.lazy import lazily
from core.weights.motion import from_original, named, original, positions, to_original, version
from tests.models.tiny_motion import adapter, frames, motion_unet, pipeline

V1, V3 = {"motion_max_seq_length": 24, "use_motion_mid_block": False}, {"use_motion_mid_block": False}
VERSIONS = {"v1": V1, "v2": {}, "v3": V3}


def _read(state):
    return {name: entry.read() for name, entry in state.items()}


def _equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def _original(module):
    """Its tensors as AnimateDiff's own program has them."""
    return {name: entry.read().contiguous().clone() for name, entry in original(lazily(module.state_dict())).items()}


def _import(*words):
    return registry.main(["weights", "import", *map(str, words)])


@pytest.fixture(scope="module")
def expected():
    """Frames of the pipeline with the adapter as it is made."""
    return frames(pipeline(adapter()))


# -------------------------------------------------------------------------------------------------------------- names


def test_the_names_of_all_546_weights_go_to_the_original_and_back():
    with torch.device("meta"):
        state = MotionAdapter().state_dict()
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(".pe")}
    assert len(weights) == 546 and sum(t.numel() for t in weights.values()) == 453_209_280
    assert len({to_original(name) for name in weights}) == 546
    assert [from_original(to_original(name)) for name in weights] == list(weights)
    assert not any(to_original(name) in state for name in weights)
    assert len(original(lazily(state))) == 546 + 2 * 21
    assert {n: e.shape for n, e in named(original(lazily(state))).items()} == {n: t.shape for n, t in state.items()}


@pytest.mark.parametrize("name", VERSIONS)
def test_the_version_shows_in_positions_and_middle_as_diffusers_and_comfyui_tell_it(name):
    with torch.device("meta"):
        state = MotionAdapter(**VERSIONS[name]).state_dict()
    theirs = original(lazily(state))
    shown = {n: torch.empty(e.shape, device="meta") for n, e in theirs.items()}
    assert infer_diffusers_model_type(shown) == f"animatediff_{name}"
    assert version({n: e.shape for n, e in named(theirs).items()}) == name


@pytest.mark.parametrize(("length", "width"), [(24, 8), (32, 320)])
def test_positions_are_those_that_diffusers_computes_bit_for_bit(length, width):
    made = adapter(block_out_channels=(width, 8), motion_max_seq_length=length)
    stock = made.state_dict()["down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"]
    assert torch.equal(positions(length, width), stock)


# ------------------------------------------------------------------------------------------------------------ originals


@pytest.mark.parametrize("name", VERSIONS)
def test_an_original_file_is_imported_as_a_folder_that_the_stock_pipeline_opens(name, tmp_path, capsys):
    module = adapter(**VERSIONS[name])
    module.save_config(tmp_path / "in")
    content = {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in _original(module).items()}}
    torch.save(content, tmp_path / "in" / "mm.ckpt")
    assert _import(tmp_path / "in", "--to", tmp_path / "out") == 0, capsys.readouterr().err
    opened = MotionAdapter.from_pretrained(tmp_path / "out" / "motion_adapter")
    _equal(opened.state_dict(), module.state_dict())
    for field in (
        "motion_norm_num_groups",
        "motion_num_attention_heads",
        "motion_max_seq_length",
        "use_motion_mid_block",
    ):
        assert opened.config[field] == module.config[field]
    assert torch.equal(frames(pipeline(opened)), frames(pipeline(module)))


def test_sizes_of_a_published_file_are_told_by_its_shapes_alone(tmp_path):
    module = adapter(block_out_channels=(32, 64, 64), motion_norm_num_groups=32, motion_num_attention_heads=8, **V1)
    save_file(_original(module), tmp_path / "mm_sd_v15.safetensors")
    (said,) = describe(str(tmp_path / "mm_sd_v15.safetensors"))
    assert said["networks"][0]["network"] == "motion modules of AnimateDiff, original names"
    assert _import(tmp_path / "mm_sd_v15.safetensors", "--to", tmp_path / "out") == 0
    opened = MotionAdapter.from_pretrained(tmp_path / "out" / "motion_adapter")
    _equal(opened.state_dict(), module.state_dict())
    assert opened.config.motion_max_seq_length == 24 and not opened.config.use_motion_mid_block


def test_a_file_without_positions_gets_them_and_others_lengths_go_into_the_networks(tmp_path):
    """The newest original program does not store them; 24 and 32 places differ in the table alone."""
    module = adapter(motion_max_seq_length=24)
    bare = {n: t for n, t in _original(module).items() if "pos_encoder" not in n}
    state = named(lazily(bare))
    assert {e.shape[1] for n, e in state.items() if n.endswith(".pe")} == {32}
    longer = adapter(seed=9, motion_max_seq_length=32)
    for given in (state, lazily(module.state_dict())):
        load_strict(longer, in_layout_of(longer, given))
        _equal(longer.state_dict(), adapter().state_dict())
    shorter = adapter(seed=9, motion_max_seq_length=24)
    load_strict(shorter, in_layout_of(shorter, state))
    _equal(shorter.state_dict(), module.state_dict())


def test_positions_that_are_not_sines_and_cosines_are_refused_not_replaced(tmp_path, capsys):
    module = adapter()
    content = {n: t + 0.1 if "pos_encoder" in n else t for n, t in _original(module).items()}
    module.save_config(tmp_path / "in")
    save_file(content, tmp_path / "in" / "mm.safetensors")
    assert _import(tmp_path / "in", "--to", tmp_path / "out") == 2
    assert "are not the sines and cosines" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_the_single_file_opens_in_diffusers_and_comes_back_bit_for_bit(tmp_path, expected):
    adapter().save_pretrained(tmp_path / "mm")
    words = ["weights", "export", str(tmp_path / "mm"), "--layout", "comfyui", "--to", str(tmp_path / "single")]
    assert registry.main(words) == 0
    file = tmp_path / "single" / "motion_module.safetensors"
    written = load_file(file)
    assert sum(n.endswith("pos_encoder.pe") for n in written) == 2 * sum("proj_in.weight" in n for n in written) > 0
    opened = MotionAdapter.from_single_file(str(file), config=str(tmp_path / "mm"), local_files_only=True)
    assert torch.equal(frames(pipeline(opened)), expected)
    (tmp_path / "single" / "config.json").write_bytes((tmp_path / "mm" / "config.json").read_bytes())
    _equal(_read(open_adapter(tmp_path / "single").state), adapter().state_dict())


# ---------------------------------------------------------------------------------------------------------- whole UNets


def test_of_a_whole_unet_as_swift_wrote_it_the_motion_modules_are_taken_with_their_sizes(tmp_path, capsys, expected):
    """Trap 8: the folder is a UNetMotionModel. The stock loader of adapters takes groups and layers from its defaults."""
    folder = tmp_path / "iter-100"
    motion_unet().save_pretrained(folder)
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        MotionAdapter.from_pretrained(folder)
    assert _import(folder, "--to", tmp_path / "out") == 0, capsys.readouterr().err
    said, taken = capsys.readouterr().out, adapter().state_dict()
    whole = len(load_file(folder / "diffusion_pytorch_model.safetensors"))
    assert f"motion_adapter: {len(taken)} tensors" in said and f"{whole - len(taken)} tensors were left" in said
    opened = MotionAdapter.from_pretrained(tmp_path / "out" / "motion_adapter")
    _equal(opened.state_dict(), taken)
    assert (opened.config.motion_norm_num_groups, opened.config.motion_layers_per_block) == (2, 1)
    assert torch.equal(frames(pipeline(opened)), expected)


def test_of_the_originals_training_checkpoint_the_motion_modules_are_taken(tmp_path):
    unet = motion_unet()
    state = {n: t for n, t in unet.state_dict().items() if "motion_modules" not in n} | _original(adapter())
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "checkpoint.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(dict(adapter().config)))
    _equal(_read(open_adapter(tmp_path).state), adapter().state_dict())


def test_of_a_pipeline_the_motion_modules_are_those_of_its_unet(tmp_path, capsys):
    """Trap 15: SWIFT's merged pipelines have the weights that count in the UNet, and the old ones in motion_adapter."""
    motion_unet(adapter(seed=11)).save_pretrained(tmp_path / "pipe" / "unet")
    adapter(seed=12).save_pretrained(tmp_path / "pipe" / "motion_adapter")
    assert _import(tmp_path / "pipe", "--to", tmp_path / "out") == 0, capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["motion_adapter"]
    _equal(MotionAdapter.from_pretrained(tmp_path / "out" / "motion_adapter").state_dict(), adapter(11).state_dict())


def test_the_unet_of_a_recipe_says_what_shapes_do_not_and_is_imported_whole(tmp_path):
    save_file(_original(adapter()), tmp_path / "mm.safetensors")
    with torch.device("meta"):
        unet = UNetMotionModel.from_config(motion_unet().config)
    (one,) = import_weights(tmp_path / "mm.safetensors", tmp_path / "a", modules={"unet": unet})
    opened = MotionAdapter.from_pretrained(one.folder)
    assert (opened.config.motion_norm_num_groups, opened.config.motion_num_attention_heads) == (2, 4)
    _equal(opened.state_dict(), adapter().state_dict())
    motion_unet().save_pretrained(tmp_path / "whole")
    (one,) = import_weights(tmp_path / "whole", tmp_path / "b", modules={"unet": unet})
    assert (one.component, one.network, one.left) == ("unet", "UNetMotionModel", 0)
    _equal(UNetMotionModel.from_pretrained(one.folder).state_dict(), motion_unet().state_dict())


def test_a_live_unet_gives_its_adapter(tmp_path, expected):
    written, lora = taken_from(motion_unet())
    assert lora is None
    write_layout("adapter", tmp_path / "mm", written, None)
    assert sorted(p.name for p in (tmp_path / "mm").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert torch.equal(frames(pipeline(MotionAdapter.from_pretrained(tmp_path / "mm"))), expected)
    with pytest.raises(UserError, match=r"--layout lora: there is no LoRA"):
        write_layout("lora", tmp_path / "x", written, None)


# ------------------------------------------------------------------------------------------------------------- hostile


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _attack(folder):
    torch.save({"state_dict": _original(adapter()), "config": _Attack()}, folder / "mm.ckpt")
    return folder / "mm.ckpt"


def _torn(folder):
    save_file(_original(adapter()), folder / "mm.safetensors")
    content = (folder / "mm.safetensors").read_bytes()
    (folder / "mm.safetensors").write_bytes(content[: len(content) // 2])
    return folder / "mm.safetensors"


def _outside(folder):
    (folder / "mm").mkdir()
    names = dict.fromkeys(adapter().state_dict(), "../../secret.safetensors")
    (folder / "mm" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder / "mm"


def _half(folder):
    state = _original(adapter())
    save_file({n: t for n, t in state.items() if "up_blocks.1" not in n}, folder / "mm.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(adapter().config)))
    return folder


def _unknown(folder):
    save_file({"some.weight": torch.ones(2)}, folder / "mm.safetensors")
    return folder / "mm.safetensors"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_attack, "refused, it asks for posix.mkdir"),
        (_torn, "cannot be read as safetensors"),
        (_outside, "refused, it names"),
        (_half, "54 missing: up_blocks.1"),
        (_unknown, "its names are those of no network|no network in it that can be imported"),
    ],
)
def test_hostile_and_broken_files_are_one_line_and_nothing_is_written(make, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = make(tmp_path)
    for words in (
        ["import", str(place), "--to", "out"],
        ["export", str(place), "--layout", "adapter", "--to", "out"],
    ):
        assert registry.main(["weights", *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        if words[0] == "import":
            assert any(part in err for part in says.split("|")), err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
