"""Open-Sora-Plan's transformer against the original's numbers, the sheet's, and diffusers' class of the same names."""

import json
import math

import pytest
import torch
from diffusers import AllegroTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from safetensors.torch import save_file
from torch.testing import assert_close

from core.attention import set_attention
from core.errors import UserError
from core.models import opensora_dit as module
from core.models.opensora_dit import OpenSoraDiT
from core.weights.importer import import_weights
from tests.parity.recorded import recorded

SIZES = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
SHARE = {"": 1e-5, "_padded": 1e-5, "_faint": 1e-5, "_image": 1e-5, "_grad_x": 5e-5}
"""Largest difference, as a share of the largest number: the limits that the recordings name."""


@pytest.fixture(scope="module")
def case():
    return recorded("opensora-dit")


def _model(case, variant, **options):
    sparse_n = case.config["variants"][variant]["sparse_n"]
    dit = OpenSoraDiT(**SIZES, num_layers=6, caption_channels=20, sparse_n=sparse_n, **options).eval()
    dit.load_state_dict(case.weights, strict=True)
    return dit


def _run(dit, case, x=None, latent_mask=None):
    """The recordings give the text and its mask an axis of size 1."""
    x = case.inputs["x"] if x is None else x
    return dit(x, case.inputs["timestep"], case.inputs["text"][:, 0], case.inputs["text_mask"][:, 0], latent_mask)


def _is(found, case, name, share):
    expected = case.outputs[name]
    assert (found - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("variant", ["dense", "sparse"])
@torch.no_grad()
def test_the_numbers_are_those_of_the_original(case, variant):
    dit, inputs = _model(case, variant), case.inputs
    found = {
        "": _run(dit, case),
        "_padded": _run(dit, case, latent_mask=inputs["latent_mask_padded"]),
        "_faint": _run(dit, case, 0.02 * inputs["x"]),
        "_image": _run(dit, case, inputs["image_x"]),
    }
    for name, output in found.items():
        _is(output, case, f"{variant}{name}", SHARE[name])
    assert_close(_run(dit, case, latent_mask=inputs["latent_mask_ones"]), found[""], rtol=0.0, atol=1e-6)
    set_attention(dit, "eager")
    _is(_run(dit, case), case, variant, SHARE[""])


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_the_gradient_is_that_of_the_original(case, variant):
    x = case.inputs["x"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((_run(_model(case, variant), case, x) * case.inputs["cotangent"]).sum(), x)
    _is(gradient, case, f"{variant}_grad_x", SHARE["_grad_x"])


@torch.no_grad()
def test_the_recorded_run_would_notice_what_can_go_wrong(case, monkeypatch):
    expected = case.outputs["sparse"]
    dit, bare = _model(case, "sparse"), case.inputs["text"][:, 0]
    whole = dit(case.inputs["x"], case.inputs["timestep"], bare, torch.ones_like(case.inputs["text_mask"][:, 0]))
    assert (whole - expected).abs().max() > 0.1 * expected.abs().max()
    for part in (block.attn1 for block in dit.transformer_blocks if block.attn1.parts > 1):
        part.run = 4 if part.run == 1 else 1
    assert (_run(dit, case) - expected).abs().max() > 0.1 * expected.abs().max()
    monkeypatch.setattr(module, "THETA", 5000.0)
    assert (_run(_model(case, "sparse"), case) - expected).abs().max() > 1e-3 * expected.abs().max()


# ------------------------------------------------------------------------------------------------ the sheet, section 13


FIGURES = {
    (2, 1): (109_216, 0.312986, 3.277876, (1.19513, 2.06145, 1.05564, 4.47856)),
    (6, 1): (260_320, 0.310258, 3.122172, (1.61030, 1.50102, 1.56058, 4.24680)),
    (6, 4): (260_320, 0.310275, 3.122447, (1.60946, 1.50318, 1.56008, 4.24426)),
}


def _wave(step, *shape):
    return torch.cos(step * torch.arange(math.prod(shape), dtype=torch.float64)).float().view(shape)


def _filled(layers, sparse_n):
    dit = OpenSoraDiT(**SIZES, num_layers=layers, caption_channels=16, sparse_n=sparse_n).eval()
    state = dit.state_dict()
    for rank, name in enumerate(sorted(state)):
        flat = torch.arange(state[name].numel(), dtype=torch.float64)
        state[name] = (0.3 * torch.sin(0.7 * flat + rank)).float().view(state[name].shape)
    dit.load_state_dict(state)
    return dit


X, TEXT, T = _wave(0.3, 2, 4, 3, 6, 10), _wave(0.11, 2, 7, 16), torch.tensor([10, 500])
MASK = torch.ones(2, 7)
MASK[1, 4:] = 0


@pytest.mark.parametrize(("layers", "sparse_n"), FIGURES)
@torch.no_grad()
def test_a_filled_network_gives_the_figures_of_the_sheet(layers, sparse_n):
    parameters, mean, std, values = FIGURES[layers, sparse_n]
    dit = _filled(layers, sparse_n)
    y = dit(X, T, TEXT, MASK)
    assert sum(p.numel() for p in dit.parameters()) == parameters
    assert (y.mean().item(), y.std().item()) == pytest.approx((mean, std), abs=2e-6)
    assert [y.flatten()[i].item() for i in (0, 1, 100, -1)] == pytest.approx(values, abs=2e-5)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (2.2, 2.0, 1.5)])
@torch.no_grad()
def test_dense_it_equals_the_stock_class_of_diffusers(scales):
    names = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
    options = SIZES | {"num_layers": 2, "caption_channels": 16} | dict(zip(names, scales, strict=True))
    stock = AllegroTransformer3DModel(**options, cross_attention_dim=48, sample_height=6, sample_width=10).eval()
    dit = OpenSoraDiT(**options, sparse_n=1).eval()
    filled = _filled(2, 1).state_dict()
    stock.load_state_dict(filled, strict=True)
    dit.load_state_dict(filled, strict=True)
    tables = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (3, 5)), (3, 5), 3, scales)
    axes = torch.meshgrid(*(grid.round().long() for grid in tables[3:]), indexing="ij")
    positions = [axis.flatten()[None] for axis in axes]
    theirs = stock(X, TEXT, T, encoder_attention_mask=MASK, image_rotary_emb=(tables[:3], positions)).sample
    assert_close(dit(X, T, TEXT, MASK), theirs, rtol=0.0, atol=5e-6)


# ----------------------------------------------------------------------------------------------------- released weights


def test_released_weights_come_through_the_import(tmp_path):
    """A file as published: the trainer's config beside it, whose ratio counts only where sparse1d does."""
    dit = _filled(3, 4)
    config = {"_class_name": "OpenSoraT2V_v1_3", "num_layers": 3, "caption_channels": 16, "sparse_n": 4} | SIZES
    for sparse in (True, False):
        folder = tmp_path / f"any93-{sparse}"
        folder.mkdir()
        save_file(dit.state_dict(), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"sparse1d": sparse, "sample_size_t": 24}))
        (done,) = import_weights(folder, tmp_path / f"out-{sparse}")
        assert (done.component, done.tensors, any(done.wrong)) == ("transformer", len(dit.state_dict()), False)
        opened = OpenSoraDiT.from_pretrained(done.folder)
        assert [block.attn1.parts for block in opened.transformer_blocks] == [1, 1, 4 if sparse else 1]
        assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in dit.state_dict().items())


def test_weights_with_a_tensor_too_few_are_refused(tmp_path):
    dit = OpenSoraDiT(num_attention_heads=1, num_layers=3, caption_channels=4, in_channels=8, out_channels=8)
    state = dit.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    (done,) = import_weights(tmp_path / "whole.safetensors", tmp_path / "out")
    told = OpenSoraDiT.load_config(done.folder)
    assert {name: told[name] for name in ("num_attention_heads", "num_layers", "caption_channels", "sparse_n")} == {
        "num_attention_heads": 1, "num_layers": 3, "caption_channels": 4, "sparse_n": 4
    }  # fmt: skip
    del state["transformer_blocks.1.ff.net.2.bias"]
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.ff\.net\.2\.bias"):
        import_weights(tmp_path / "torn.safetensors", tmp_path / "torn")
