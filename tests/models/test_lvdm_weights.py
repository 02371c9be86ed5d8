"""Checkpoints in the original's layout: every part is found, nothing is left out or made up, and no pickle is executed."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.models.lvdm_unet import LVDMUNet
from core.models.video_vae import VideoAutoencoder
from core.weights.lvdm import load_strict, original_state


def _unet():
    return LVDMUNet(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,))


@pytest.fixture(scope="module")
def full():
    """A full checkpoint: raw and averaged UNet, an autoencoder with both names of its kernels, buffers, a text encoder."""
    torch.manual_seed(0)
    unet, vae = _unet().state_dict(), VideoAutoencoder(n_hiddens=4, norm_num_groups=4).state_dict()
    tensors = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    tensors |= {f"model_ema.diffusion_model{name.replace('.', '')}": value + 1 for name, value in unet.items()}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    tensors |= {f"first_stage_model.{name}": value for name, value in vae.items()}
    tensors |= {
        f"first_stage_model.{name.replace('.conv.', '.')}": value.clone()
        for name, value in vae.items()
        if name.endswith(".conv.weight")
    }
    tensors |= {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "betas": torch.zeros(1000),
        "scale_factor": torch.tensor(1.0),
    }
    return tensors | {"cond_stage_model.transformer.x.weight": torch.zeros(2)}


def _equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def _saved(full, path):
    if path.suffix == ".safetensors":
        save_file(full, path)
    else:
        torch.save({"epoch": 3, "state_dict": full, "lr_schedulers": []}, path)
    return path


@pytest.mark.parametrize("file", ["full.ckpt", "full.pt", "full.bin", "full.safetensors"])
def test_every_part_of_a_full_checkpoint_is_found_and_loads(full, tmp_path, file):
    path = _saved(full, tmp_path / file)
    unet, vae = _unet(), VideoAutoencoder(n_hiddens=4, norm_num_groups=4)
    load_strict(unet, original_state(path, "unet"))
    load_strict(vae, original_state(path, "vae"))
    _equal(
        unet.state_dict(),
        {k.removeprefix("model.diffusion_model."): v for k, v in full.items() if k.startswith("model.diff")},
    )
    averaged = original_state(path, "unet_ema")
    _equal(averaged, {name: value + 1 for name, value in unet.state_dict().items()})
    load_strict(unet, averaged)


def test_a_file_of_one_part_is_read_without_its_loss_network(full):
    vae = {
        name.removeprefix("first_stage_model."): value for name, value in full.items() if name.startswith("first_stage")
    }
    state = original_state(vae | {"loss.discriminator.weight": torch.zeros(3)}, "vae")
    load_strict(VideoAutoencoder(n_hiddens=4, norm_num_groups=4), state)


def test_a_checkpoint_without_the_part_is_refused():
    with pytest.raises(UserError, match=r"no vae in this checkpoint: no name starts with first_stage_model\."):
        original_state({"model.diffusion_model.out.0.weight": torch.zeros(3)}, "vae")
    with pytest.raises(UserError, match="no moving average"):
        original_state({"model.diffusion_model.out.0.weight": torch.zeros(3)}, "unet_ema")


def test_a_moving_average_with_a_hole_is_refused(full):
    holed = {name: value for name, value in full.items() if name != "model_ema.diffusion_modelout2bias"}
    with pytest.raises(UserError, match=r"lacks 1 of 120 tensors: out\.2\.bias"):
        original_state(holed, "unet_ema")


def test_what_does_not_fit_is_named_and_nothing_is_loaded():
    unet = _unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["time_embed.0.bias"]
    state["label_emb.weight"] = torch.zeros(1)
    state["out.2.bias"] = torch.zeros(9)
    expected = (
        "these weights are not LVDMUNet's (120 tensors): 1 missing: time_embed.0.bias; 1 unused: label_emb.weight; "
        "1 misshapen: out.2.bias (9,) for (4,)"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        load_strict(unet, state)
    _equal(unet.state_dict(), before)


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(UserError, match=r"120 missing: (\S+, ){4}\.\.\.$"):
        load_strict(_unet(), {})


class _Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": _Code()}}, "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt: refused, it asks for posix\.mkdir; a checkpoint may hold"):
        original_state("evil.ckpt", "unet")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ckpt"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt: no such file"):
        original_state(tmp_path / "none.ckpt", "unet")
