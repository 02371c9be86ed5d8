"""LoRAs in every layout that is about: read with their alpha or refused, folded in, and opened by the stock pipeline."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import registry
from core.errors import UserError
from core.verbs.weights import describe
from core.weights.adapters import merged, open_adapter, taken_from, write_layout
from core.weights.folder import whole_folder
from core.weights.lora import LORA_NAME, lora_at, read_lora
from core.weights.motion import to_original
from tests.models.tiny_motion import (
    ALL,
    ATTENTION,
    NO_PROJ,
    adapter,
    called_as_before,
    frames,
    lora_state,
    motion_unet,
    pipeline,
    with_lora,
)

RANK, ALPHA = 2, 8
"""Scale 4, as with rank 8 and alpha 32."""


def _weights(*words):
    return registry.main(["weights", *map(str, words)])


def _differ(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def unet():
    """A UNet with a live LoRA at scale 4 in all that stock pipelines can call."""
    return with_lora(motion_unet(), NO_PROJ, RANK, ALPHA)


@pytest.fixture(scope="module")
def live(unet):
    """Its frames, which are others than without the LoRA."""
    made = frames(pipeline(unet=unet))
    assert _differ(made, frames(pipeline())) > 5e-3
    return made


@pytest.fixture(scope="module")
def mm(tmp_path_factory):
    """The adapter without the LoRA, as a folder."""
    folder = tmp_path_factory.mktemp("adapter") / "mm"
    adapter().save_pretrained(folder)
    return folder


@pytest.fixture
def mine(mm, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(mm, tmp_path / "mm"))


@pytest.fixture(scope="module")
def opened(unet, live, tmp_path_factory):
    """The file of the live LoRA, which the stock pipeline opens with the same frames: what others come to, to the bit."""
    folder = tmp_path_factory.mktemp("lora")
    file = write_layout("lora", folder, *taken_from(unet))
    assert _differ(_opened(folder), live) < 1e-6
    return file.read_bytes()


def _opened(folder, **kwargs):
    """Frames of the stock pipeline with this file."""
    pipe = pipeline()
    pipe.load_lora_weights(folder, **kwargs)
    return frames(pipe)


# ------------------------------------------------------------------------------------------------------------- layouts


def _diffusers(unet, folder):
    AnimateDiffPipeline.save_lora_weights(
        folder, lora_state(unet), unet_lora_adapter_metadata=unet.peft_config["default"].to_dict()
    )


def _bare_unet(unet, folder):
    unet.save_lora_adapter(folder)


def _peft(unet, folder):
    model = get_peft_model(motion_unet(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=NO_PROJ))
    model.load_state_dict({f"base_model.model.{n}": t for n, t in unet.state_dict().items()})
    model.save_pretrained(folder)


def _swift(unet, folder):
    (folder / "default").mkdir(parents=True)
    state = {n: t.clone() for n, t in unet.state_dict().items() if ".lora_" in n}
    assert all(".default.weight" in n for n in state)
    torch.save(state, folder / "default" / "adapter_model.bin")
    config = {"peft_type": "LORA", "swift_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05}
    (folder / "default" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "configuration.json").write_text("{}")


def _with_alphas(unet, folder):
    folder.mkdir()
    state = {
        f"unet.{n}".replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for n, t in lora_state(unet).items()
    }
    layers = {n.split(".lora.")[0] for n in state}
    save_file(state | {f"{layer}.alpha": torch.tensor(float(ALPHA)) for layer in layers}, folder / "a.safetensors")


@pytest.mark.parametrize("write", [_diffusers, _bare_unet, _peft, _swift, _with_alphas])
def test_every_layout_is_imported_with_its_alpha_and_opens_in_the_stock_pipeline(write, unet, opened, tmp_path, capsys):
    write(unet, tmp_path / "in")
    assert _weights("import", tmp_path / "in", "--to", tmp_path / "out") == 0, capsys.readouterr().err
    assert "scale 4" in capsys.readouterr().out
    assert (tmp_path / "out" / "lora" / LORA_NAME).read_bytes() == opened


def test_info_tells_a_lora_from_a_network_and_from_a_network_with_one_in_it(unet, tmp_path):
    _swift(unet, tmp_path / "lora")
    (told,) = describe(str(tmp_path / "lora"))
    assert [n["network"] for n in told["networks"]] == ["LoRA"] and told["tensors"] == len(lora_state(unet))
    save_file({n: t.clone() for n, t in unet.state_dict().items()}, tmp_path / "both.safetensors")
    assert lora_at(tmp_path / "lora") and lora_at(tmp_path / "both.safetensors") is None


def test_alphas_ranks_and_scaling_that_differ_by_layer_are_kept(tmp_path):
    told = {
        "rank_pattern": {"attn1.to_q": 3, "net.2": 1},
        "alpha_pattern": {"attn2.to_k": 1, "net.2": 5},
        "use_rslora": True,
    }
    unet = with_lora(motion_unet(), NO_PROJ, RANK, ALPHA, **told)
    unet.save_lora_adapter(tmp_path / "in")
    assert _weights("import", tmp_path / "in", "--to", tmp_path / "out") == 0
    assert _differ(_opened(tmp_path / "out" / "lora"), frames(pipeline(unet=unet))) < 1e-6


def test_a_file_without_alpha_is_refused_until_alpha_is_given(unet, live, opened, tmp_path, capsys):
    """Trap 6: saved without the adapter's metadata a LoRA comes back at the scale of its rank, without a word."""
    AnimateDiffPipeline.save_lora_weights(tmp_path / "in", lora_state(unet))
    assert _differ(_opened(tmp_path / "in"), live) > 1e-3
    assert _weights("import", tmp_path / "in", "--to", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "no alpha in it" in err and "rank 2" in err and "--alpha" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert _weights("import", tmp_path / "in", "--to", tmp_path / "out", "--alpha", ALPHA) == 0
    assert (tmp_path / "out" / "lora" / LORA_NAME).read_bytes() == opened


def test_a_peft_file_of_which_the_stock_pipeline_loads_nothing_is_read(unet, tmp_path, capsys):
    """Trap 7: names that no key fits give no error there, and zero tensors."""
    _peft(unet, tmp_path / "in")
    assert torch.equal(_opened(tmp_path / "in", weight_name="adapter_model.safetensors"), frames(pipeline()))
    assert len(read_lora(tmp_path / "in").tensors) == len(lora_state(unet))
    save_file(
        {"other.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(8, 2)}, tmp_path / "b.safetensors"
    )
    assert _weights("import", tmp_path / "b.safetensors", "--to", tmp_path / "out", "--alpha", 1) == 2
    assert "none of its 2 names fits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_swifts_oldest_folders_have_its_defaults(tmp_path):
    state = {
        n.replace(".weight", ".default.weight"): t.repeat(*((4, 1) if "lora_A" in n else (1, 4)))
        for n, t in lora_state(with_lora(motion_unet())).items()
    }
    (tmp_path / "default").mkdir()
    torch.save(state, tmp_path / "default" / "adapter_model.bin")
    lora = read_lora(tmp_path)
    assert {(lora.rank(layer), lora.scale(layer)) for layer in lora.layers} == {(8, 4.0)}
    assert lora.told == "SWIFT's defaults"


# ---------------------------------------------------------------------------------------------------------- MotionLoRA


def test_a_motion_lora_goes_out_and_comes_back_in_both_released_layouts(tmp_path, capsys):
    unet = with_lora(motion_unet(), ATTENTION, RANK, ALPHA)
    made, (written, lora) = frames(pipeline(unet=unet)), taken_from(unet)
    write_layout("motion-lora", tmp_path / "hub", written, lora)
    name = "diffusion_pytorch_model.safetensors"
    state = load_file(tmp_path / "hub" / name)
    assert "unet.mid_block.motion_modules.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in state
    assert _differ(_opened(tmp_path / "hub", weight_name=name), made) < 1e-6
    write_layout("comfyui-lora", tmp_path / "comfy", written, lora)
    theirs = load_file(tmp_path / "comfy" / "motion_lora.safetensors")
    assert theirs.keys() == {to_original(n.removeprefix("unet.")) for n in state}
    assert all(".temporal_transformer." in n for n in theirs)
    torch.save({"state_dict": theirs}, tmp_path / "v2_lora_ZoomIn.ckpt")
    for place in (tmp_path / "hub", tmp_path / "v2_lora_ZoomIn.ckpt"):
        assert _weights("import", place, "--to", tmp_path / f"out-{place.name}") == 0, capsys.readouterr().err
        assert "scale 1" in capsys.readouterr().out
    files = [tmp_path / f"out-{name}" / "lora" / LORA_NAME for name in ("hub", "v2_lora_ZoomIn.ckpt")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert _differ(_opened(files[0].parent), made) < 1e-6


def test_layers_that_motion_lora_has_no_names_for_are_refused(unet, tmp_path):
    with pytest.raises(UserError, match=r"have no name in MotionLoRA.*net\."):
        write_layout("motion-lora", tmp_path / "x", *taken_from(unet))
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- merging


def test_a_merged_adapter_gives_the_frames_of_the_live_lora(unet, live, mm, tmp_path, capsys):
    """Trap 15: what is merged is in the MotionAdapter's folder itself, and survives a pipeline that is saved and opened."""
    _swift(unet, tmp_path / "lora")
    assert _weights("merge", mm, tmp_path / "lora", "--to", tmp_path / "merged") == 0, capsys.readouterr().err
    assert "scale 4" in capsys.readouterr().out
    opened = MotionAdapter.from_pretrained(tmp_path / "merged")
    assert opened.state_dict().keys() == adapter().state_dict().keys()
    assert _differ(frames(pipeline(opened)), live) < 1e-4
    opened.save_pretrained(tmp_path / "pipe" / "motion_adapter")
    again = MotionAdapter.from_pretrained(tmp_path / "pipe", subfolder="motion_adapter")
    assert torch.equal(frames(pipeline(again)), frames(pipeline(opened)))


def test_layers_that_the_stock_pipeline_cannot_call_are_said_and_work_when_merged(mm, tmp_path, capsys):
    """SWIFT's targets: proj_in and proj_out too, which diffusers calls with a keyword that PEFT's layer lacks."""
    unet = with_lora(motion_unet(), ALL, RANK, ALPHA)
    _swift(unet, tmp_path / "lora")
    with pytest.raises(TypeError):
        frames(pipeline(unet=unet))
    made = frames(pipeline(unet=called_as_before(unet)))
    assert _weights("import", tmp_path / "lora", "--to", tmp_path / "out") == 0
    assert "`weights merge` folds it in" in capsys.readouterr().out
    assert _weights("merge", mm, tmp_path / "out" / "lora", "--to", tmp_path / "merged") == 0
    assert _differ(frames(pipeline(MotionAdapter.from_pretrained(tmp_path / "merged"))), made) < 1e-4


def test_a_live_lora_goes_out_in_every_layout(unet, live, tmp_path):
    written, lora = taken_from(unet)
    write_layout("lora", tmp_path / "lora", written, lora)
    write_layout("adapter", tmp_path / "adapter", written, lora)
    assert _differ(frames(pipeline(MotionAdapter.from_pretrained(tmp_path / "adapter"))), live) < 1e-4
    file = write_layout("comfyui", tmp_path / "comfy", written, lora)
    opened = MotionAdapter.from_single_file(str(file), config=str(tmp_path / "adapter"), local_files_only=True)
    assert _differ(frames(pipeline(opened)), live) < 1e-4
    with safe_open(tmp_path / "lora" / LORA_NAME, framework="pt") as header:
        config = json.loads(header.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["unet.lora_dropout"]) == (RANK, ALPHA, 0.0)
    assert isinstance(PeftModel(motion_unet(), LoraConfig(**{n[5:]: v for n, v in config.items()})), PeftModel)


def test_a_merge_replaces_only_an_adapter_folder_and_only_when_told(unet, mine, tmp_path, capsys):
    _swift(unet, tmp_path / "lora")
    words = ["merge", mine, tmp_path / "lora", "--to"]
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    assert _weights(*words, mine) == 2 and "is not empty" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before
    assert _weights(*words, tmp_path, "--replace-if-exists") == 2
    assert "not replaced, it is no MotionAdapter's" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(mine)
    assert _weights(*words, tmp_path / "link", "--replace-if-exists") == 2
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before
    expected = merged(open_adapter(mine), read_lora(tmp_path / "lora")).state
    expected = {name: entry.read().clone() for name, entry in expected.items()}
    assert _weights(*words, mine, "--replace-if-exists") == 0  # into the folder that is read
    state = load_file(mine / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(state[name], t) for name, t in expected.items()) and len(state) == len(expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "lora", "mm"]


def test_a_folder_is_written_whole_or_not_at_all(mine, tmp_path):
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    with pytest.raises(OSError, match="no space"), whole_folder(mine, replace=True) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{")
        raise OSError("no space")
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before and [*tmp_path.iterdir()] == [mine]
    mine.rename(tmp_path / ".replaced-mm")  # a kill between the two renames of a replacement
    with pytest.raises(UserError, match="is not empty"), whole_folder(mine):
        pass
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before and [*tmp_path.iterdir()] == [mine]


# -------------------------------------------------------------------------------------------------------------- refusals


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _attack(folder, state):
    torch.save(state | {"x": _Attack()}, folder / "adapter_model.bin")


def _torn(folder, state):
    save_file(state, folder / "adapter_model.safetensors")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


def _bad_config(text):
    def write(folder, state):
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(text)

    return write


def _bad_header(text):
    return lambda folder, state: save_file(state, folder / "a.safetensors", metadata={"lora_adapter_metadata": text})


def _half(folder, state):
    state.pop(sorted(state)[0])
    save_file(state, folder / "a.safetensors")


def _text_encoder(folder, state):
    save_file(state | {"text_encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 8)}, folder / "a.safetensors")


def _outside(folder, state):
    names = dict.fromkeys(state, "../secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _spatial(folder, state):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    more = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    _bad_config('{"lora_alpha": 8}')(folder, state | more)


def _other_sizes(folder, state):
    wider = {n: torch.ones(2, 16) if "lora_A" in n else torch.ones(16, 2) for n in state if ".attn1.to_q." in n}
    _bad_config('{"lora_alpha": 8}')(folder, wider)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_attack, "it asks for posix.mkdir|may hold tensors and plain values only"),
        (_torn, "cannot be read as safetensors"),
        (_bad_config("{"), "adapter_config.json: cannot be read"),
        (_bad_config("[" * 100_000), "adapter_config.json: cannot be read"),
        (_bad_config('{"lora_alpha": "32"}'), "lora_alpha '32': expected a positive number"),
        (_bad_config('{"lora_alpha": NaN}'), "lora_alpha nan"),
        (_bad_config('{"lora_alpha": 8, "alpha_pattern": {"(a+)+$": 1}}'), "only names of layers are read here"),
        (_bad_config('{"lora_alpha": 8, "use_dora": true}'), "a DoRA"),
        (_bad_header("{"), "in its header is no json"),
        (_bad_header("[]"), "expected a json object"),
        (_half, "is no pair of"),
        (_text_encoder, "1 of its tensors are no LoRA's of a UNet: text_encoder"),
        (_outside, "no LoRA, no name in it is one's"),
        (_spatial, "1 of its 57 layers are not in these motion modules|down_blocks.0.attentions.0"),
        (_other_sizes, "is for a matrix of"),
    ],
)
def test_hostile_and_broken_loras_are_one_line_and_nothing_is_written(
    write, says, mm, unet, tmp_path, capsys, monkeypatch
):
    (tmp_path / "lora").mkdir()
    write(tmp_path / "lora", lora_state(unet))
    there = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert _weights("merge", mm, tmp_path / "lora", "--to", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and any(part in err for part in says.split("|")), err
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["merge", "a"], "weights merge ADAPTER LORA --to DIR"),
        (["merge", "a", "b"], "--to DIR"),
        (["merge", "a", "b", "--to", "x", "--alpha", "0"], "must be positive"),
        (["export", "a", "--to", "x", "--alpha", "2"], "goes with --layout"),
        (["export", "a", "--to", "x", "--layout", "ckpt"], "layout"),
        (["import", "shipped:lvdm-video-vae-tiny", "--to", "x", "--alpha", "2"], "--alpha is for a LoRA"),
        (["export", "shipped:lvdm-video-vae-tiny", "--to", "x", "--layout", "comfyui"], "no motion modules in it"),
        (["merge", "shipped:lvdm-video-vae-tiny", "shipped:lvdm-video-vae-tiny", "--to", "x"], "no motion modules"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _weights(*words) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
