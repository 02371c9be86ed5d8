"""The unconditional UNet against the original's numbers."""

import pytest
import torch
from torch.testing import assert_close

from core.attention import set_attention
from tests.parity.nets import short_unet
from tests.parity.recorded import FAINT, GRADIENT, OUTPUT, recorded


@pytest.fixture(scope="module")
def case():
    return recorded("lvdm-unet-short")


@pytest.fixture(scope="module")
def unet(case):
    return short_unet(case)


def _run(unet, case, variant):
    with torch.no_grad():
        return unet(case.inputs[f"{variant}.x"], case.inputs[f"{variant}.timesteps"])


@pytest.mark.parametrize("variant", ["main", "long", "brief", "faint"])
def test_the_unet_gives_the_numbers_of_the_original(unet, case, variant):
    assert_close(_run(unet, case, variant), case.outputs[f"{variant}.y"], **(FAINT if variant == "faint" else OUTPUT))


@pytest.mark.parametrize("backend", ["eager", "flash"])
def test_another_attention_back_end_gives_the_numbers_of_the_original(case, backend):
    unet = short_unet(case)
    set_attention(unet, backend)
    assert_close(_run(unet, case, "main"), case.outputs["main.y"], **OUTPUT)


def test_the_input_s_gradient_is_the_original_s(unet, case):
    x = case.inputs["main.x"].clone().requires_grad_()
    y = unet(x, case.inputs["main.timesteps"])
    (gradient,) = torch.autograd.grad((y * case.inputs["main.cotangent"]).sum(), x)
    assert_close(gradient, case.outputs["main.grad_x"], **GRADIENT)


def test_both_ways_of_attending_over_frames_give_the_numbers_of_the_original(unet, case, monkeypatch):
    """`main` has 4 frames and `long` 9: the one written out product by product, the other by matrix products, and swapped."""
    for few, variant in ((0, "main"), (100, "long")):
        monkeypatch.setattr("core.attention.FEW_FRAMES", few)
        assert_close(_run(unet, case, variant), case.outputs[f"{variant}.y"], **OUTPUT)


def test_without_the_transposed_key_term_the_numbers_are_others(case, monkeypatch):
    """The recorded run would notice the usual orientation of relative positions: 1.4 at the largest."""
    import core.models.lvdm_unet as module

    usual = module.relative_logits
    monkeypatch.setattr(module, "relative_logits", lambda q, rows: usual(q, rows).transpose(2, 3))
    assert (_run(short_unet(case), case, "main") - case.outputs["main.y"]).abs().max() > 0.5
