"""Published formats through `weights import`, against the numbers of the implementations that wrote them."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.testing import assert_close

from core.errors import UserError
from core.models import lvdm_text_unet
from core.models.lvdm_unet import LVDMUNet
from core.models.video_vae import VideoAutoencoder
from core.slots import FrameVAE, LVDMShortUNet, LVDMTextUNet, VideoVAE
from core.weights.importer import import_weights
from core.weights.lazy import lazily
from core.weights.load import load_component
from core.weights.networks import recognised
from core.weights.stored import open_stored
from tests.parity.nets import empty_unet
from tests.parity.recorded import GOLDEN, recorded

WITHIN = {"rtol": 0.0, "atol": 1e-4}
UNETS = {"lvdm-unet-short": LVDMUNet, "lvdm-unet-text2video": lvdm_text_unet.LVDMTextUNet}


def _authors_file(case, path, prefix, more=None):
    """A checkpoint as the authors' trainer writes it, every kernel that it registers twice under both names."""
    weights = case.weights | {alias: case.weights[name] for alias, name in case.config.get("aliases", {}).items()}
    torch.save({"epoch": 1, "state_dict": {prefix + n: t for n, t in weights.items()} | (more or {})}, path)
    return path


def _source(name, folder):
    """What was published for a golden case: Paddle's file, or the authors' checkpoint."""
    if name.endswith("-paddle"):
        return GOLDEN / name / "model_state.pdparams"
    part = "first_stage_model." if "vae" in name else "model.diffusion_model."
    return _authors_file(recorded(name), folder / f"{name}.ckpt", part, {"betas": torch.zeros(1000)})


@pytest.mark.parametrize("name", [f"{name}{kind}" for name in UNETS for kind in ("", "-paddle")])
@torch.no_grad()
def test_unets_come_through_the_import_without_being_told_what_they_are(name, tmp_path):
    case = recorded(name)
    (done,) = import_weights(_source(name, tmp_path), tmp_path / "out")
    assert (done.component, done.tensors, any(done.wrong)) == ("unet", len(open_stored(done.folder).tensors), False)
    unet = UNETS[name.removesuffix("-paddle")].from_pretrained(tmp_path / "out" / "unet").eval()
    for variant in ("main", "long"):
        arguments = [case.inputs[k] for x in ("x", "timesteps", "context") if (k := f"{variant}.{x}") in case.inputs]
        assert_close(unet(*arguments), case.outputs[f"{variant}.y"], **WITHIN)


@pytest.mark.parametrize("name", ["lvdm-vae3d", "lvdm-vae3d-paddle"])
@torch.no_grad()
def test_the_video_autoencoder_comes_through_the_import(name, tmp_path):
    case = recorded(name)
    source = _source(name, tmp_path)
    if name.endswith("-paddle"):  # strides show in no shape, so the config beside the weights is needed
        (tmp_path / "published").mkdir()
        for file in ("model_state.pdparams", "model_config.json"):
            (tmp_path / "published" / file).write_bytes((GOLDEN / name / file).read_bytes())
        source = tmp_path / "published"
    (done,) = import_weights(source, tmp_path / "out")
    assert not done.has_constants
    vae = VideoAutoencoder.from_pretrained(tmp_path / "out" / "vae").eval()
    assert_close(vae.encode(case.inputs["main.video"]).mean, case.outputs["main.mean"], **WITHIN)
    assert_close(vae.decode(case.inputs["main.z"]), case.outputs["main.decoded"], **WITHIN)


@pytest.mark.parametrize("name", ["ldm-vae-kl", "diffusers-vae-kl"])
@pytest.mark.parametrize("old_attention", [False, True])
@torch.no_grad()
def test_image_autoencoders_of_both_layouts_open_in_stock_diffusers(name, old_attention, tmp_path):
    case = recorded(name)
    weights = case.weights
    if old_attention and name.startswith("diffusers"):
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, before in old.items():
            weights = {n.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): t for n, t in weights.items()}
        assert any(".query." in n for n in weights) and not any(".to_q." in n for n in weights)
    elif old_attention:
        weights = {f"first_stage_model.{n}": t for n, t in weights.items()} | {"betas": torch.zeros(9)}
    save_file(weights, tmp_path / "vae.safetensors")
    import_weights(tmp_path / "vae.safetensors", tmp_path / "out")
    vae = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").eval()
    posterior = vae.encode(case.inputs["main.image"]).latent_dist
    assert_close(posterior.mean, case.outputs["main.mean"], **WITHIN)
    assert_close(vae.decode(case.inputs["main.z"]).sample, case.outputs["main.decoded"], **WITHIN)


@torch.no_grad()
def test_paddle_pipelines_and_authors_files_load_where_weights_are_named(tmp_path):
    """A folder as ppdiffusers lays it out, and one authors' file with raw and averaged weights, without an import."""
    case = recorded("lvdm-unet-short-paddle")
    (tmp_path / "pipeline/unet").mkdir(parents=True)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    for file in ("model_state.pdparams", "model_config.json"):
        (tmp_path / "pipeline/unet" / file).write_bytes((GOLDEN / "lvdm-unet-short-paddle" / file).read_bytes())
    unet = empty_unet(LVDMUNet, case)
    load_component(unet, str(tmp_path / "pipeline"), "unet")
    assert_close(unet(case.inputs["main.x"], case.inputs["main.timesteps"]), case.outputs["main.y"], **WITHIN)

    case = recorded("lvdm-unet-short")
    averages = {f"model_ema.diffusion_model{n.replace('.', '')}": t + 1 for n, t in case.weights.items()}
    path = _authors_file(case, tmp_path / "short_sky.ckpt", "model.diffusion_model.", averages)
    unet = empty_unet(LVDMUNet, case)
    for spec, plus in ((str(path), 0), (f"raw:{path}", 0), (f"ema:{path}", 1)):
        load_component(unet, spec, "unet")
        assert all(torch.equal(t, case.weights[n] + plus) for n, t in unet.state_dict().items())


def test_what_does_not_fit_is_listed_and_refused_unless_told(tmp_path):
    case = recorded("lvdm-unet-short")
    weights = {f"model.diffusion_model.{n}": t for n, t in case.weights.items()}
    del weights["model.diffusion_model.time_embed.2.bias"]
    weights["model.diffusion_model.label_emb.weight"] = torch.zeros(3)
    weights["model.diffusion_model.out.2.bias"] = torch.zeros(9)
    save_file(weights, tmp_path / "a.safetensors")
    says = r"1 missing: time_embed\.2\.bias; 1 unused: label_emb\.weight; 1 misshapen: out\.2\.bias \(9,\) for \(4,\)"
    with pytest.raises(UserError, match=says):
        import_weights(tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (done,) = import_weights(tmp_path / "a.safetensors", tmp_path / "out", partial=True)
    assert [len(names) for names in done.wrong] == [1, 1, 1]
    unet = LVDMUNet.from_pretrained(tmp_path / "out" / "unet")
    assert torch.equal(unet.state_dict()["time_embed.0.bias"], case.weights["time_embed.0.bias"])
    with pytest.raises(UserError, match="is there already"):
        import_weights(tmp_path / "a.safetensors", tmp_path / "out", partial=True)


def _published(slot):
    with torch.device("meta"):
        return slot.build()


def test_the_sizes_of_every_published_network_are_told_from_its_shapes():
    for slot in (LVDMShortUNet(), LVDMTextUNet(), VideoVAE(), FrameVAE()):
        module = _published(slot)
        state = lazily(module.state_dict())
        network = recognised(state)
        with torch.device("meta"):
            again = network.kind()(**network.arguments(network.rename(state), {}))
        assert {n: t.shape for n, t in again.state_dict().items()} == {
            n: t.shape for n, t in module.state_dict().items()
        }
        told = {name: _in_order(again.config[name]) for name in network.settings(_shapes(state))}
        assert told == {name: _in_order(module.config[name]) for name in told}


def _shapes(state):
    return {name: entry.shape for name, entry in state.items()}


def _in_order(value):
    return sorted(value) if isinstance(value, (tuple, list)) else value


def test_a_full_checkpoint_gives_all_its_networks_averaged_where_there_is_an_average(tmp_path):
    unet, vae = recorded("lvdm-unet-short"), recorded("lvdm-vae3d")
    more = {f"first_stage_model.{n}": t for n, t in vae.weights.items()} | {"betas": torch.zeros(1000)}
    more |= {f"model_ema.diffusion_model{n.replace('.', '')}": t + 1 for n, t in unet.weights.items()}
    path = _authors_file(unet, tmp_path / "full.ckpt", "model.diffusion_model.", more)
    for averaged, plus in ((True, 1), (False, 0)):
        done = import_weights(path, tmp_path / f"out{plus}", averaged=averaged)
        assert {d.component: d.averaged for d in done} == {"unet": averaged, "vae": False}
        for part, case, more_by in (("unet", unet, plus), ("vae", vae, 0)):
            state = open_stored(tmp_path / f"out{plus}" / part).tensors
            assert state.keys() == case.weights.keys()
            assert all(torch.equal(state[n].read(), t + more_by) for n, t in case.weights.items())
    with pytest.raises(UserError, match="no moving average in it of vae"):
        import_weights(path, tmp_path / "none", only="vae", averaged=True)
