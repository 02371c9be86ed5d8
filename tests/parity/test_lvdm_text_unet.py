"""The text-to-video UNet against the original's numbers."""

import pytest
import torch
from torch.testing import assert_close

import core.models.lvdm_text_unet as module
from core.attention import set_attention
from core.weights.paddle import matrices
from tests.parity.nets import paddle_text_unet, text_unet
from tests.parity.recorded import FAINT, GRADIENT, OUTPUT, recorded


@pytest.fixture(scope="module")
def case():
    return recorded("lvdm-unet-text2video")


@pytest.fixture(scope="module")
def unet(case):
    return text_unet(case)


@torch.no_grad()
def _run(unet, case, variant="main"):
    return unet(*(case.inputs[f"{variant}.{name}"] for name in ("x", "timesteps", "context")))


@pytest.mark.parametrize("variant", ["main", "long", "brief", "faint"])
def test_the_unet_gives_the_numbers_of_the_original(unet, case, variant):
    y = case.outputs[f"{variant}.y"]
    assert_close(_run(unet, case, variant), y, **(FAINT if variant == "faint" else OUTPUT))
    assert (_run(unet, case, variant) - y).norm() < 1e-4 * y.norm()


@pytest.mark.parametrize("backend", ["eager", "flash"])
def test_another_attention_back_end_gives_the_numbers_of_the_original(case, backend):
    unet = text_unet(case)
    set_attention(unet, backend)
    assert_close(_run(unet, case), case.outputs["main.y"], **OUTPUT)


def test_the_gradients_of_input_and_text_are_the_original_s(unet, case):
    x, context = (case.inputs[f"main.{name}"].clone().requires_grad_() for name in ("x", "context"))
    y = unet(x, case.inputs["main.timesteps"], context)
    gradients = torch.autograd.grad((y * case.inputs["main.cotangent"]).sum(), (x, context))
    for gradient, name in zip(gradients, ("grad_x", "grad_context"), strict=True):
        expected = case.outputs[f"main.{name}"]
        assert_close(gradient, expected, **GRADIENT)
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_both_ways_of_attending_over_frames_give_the_numbers_of_the_original(unet, case, monkeypatch):
    for few, variant in ((0, "main"), (100, "long")):
        monkeypatch.setattr("core.attention.FEW_FRAMES", few)
        assert_close(_run(unet, case, variant), case.outputs[f"{variant}.y"], **OUTPUT)


def test_with_the_key_term_of_the_unconditional_model_the_numbers_are_others(case, monkeypatch):
    """The recorded run would notice: the two models differ in the orientation of relative positions."""
    usual = module.relative_logits
    monkeypatch.setattr(module, "relative_logits", lambda q, rows: usual(q, rows).transpose(2, 3))
    assert (_run(text_unet(case), case) - case.outputs["main.y"]).abs().max() > 0.5


def test_with_the_two_temporal_norms_swapped_the_numbers_are_others(case):
    unet = text_unet(case)
    for part in unet.modules():
        if isinstance(part, module.SpaceTimeBlock):
            part.norm4, part.norm5 = part.norm5, part.norm4
    assert (_run(unet, case) - case.outputs["main.y"]).abs().max() > 0.2


# ------------------------------------------------------------------------------------------------------------ Paddle

PORT = "lvdm-unet-text2video-paddle"


@pytest.fixture(scope="module")
def port():
    return recorded(PORT)


def test_paddle_s_port_keeps_exactly_the_matrices_of_linear_layers_transposed(port):
    unet = paddle_text_unet(port, PORT)
    assert matrices(unet) == set(port.config["linear_weights_in_out"])


@pytest.mark.parametrize("variant", ["main", "long"])
def test_from_the_file_that_paddle_wrote_come_the_numbers_of_its_port(port, variant):
    y = port.outputs[f"{variant}.y"]
    found = _run(paddle_text_unet(port, PORT), port, variant)
    assert_close(found, y, **OUTPUT)
    assert (found - y).norm() < 1e-4 * y.norm()
