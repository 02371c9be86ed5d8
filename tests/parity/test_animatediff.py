"""AnimateDiff against the numbers of stock diffusers and of ms-swift's training step: the UNet, the loss, four updates, and
the latents and frames of the stock pipeline. The weights come in through the recipe's fields.
"""

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch.testing import assert_close

from core.build import parameter_groups
from core.draw import Draw
from core.models.partly import learnt
from core.sampling import sample, told
from core.slots import (
    AdamW,
    CLIPText,
    Diffusion,
    FrameVAE,
    MotionModules,
    MotionUNet,
    Objective,
    StableDiffusionUNet,
    StockDDIM,
)
from core.weights.fit import load_strict
from core.weights.start import load_start
from registry import get
from tests.parity.recorded import recorded

SIZES = {"block_out_channels": (16, 32), "layers_per_block": 1, "num_heads": 4, "context_dim": 16, "norm_num_groups": 4}
NAMES = {"posterior": "posterior_noise", "noise": "noise"}


@pytest.fixture(scope="module")
def case():
    return recorded("animatediff-step")


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """The recorded weights as published: unet/ of Stable Diffusion, motion_adapter/ beside it."""
    root = tmp_path_factory.mktemp("published")
    for part in ("unet", "motion_adapter"):
        (root / part).mkdir()
        state = {n.removeprefix(f"{part}."): t for n, t in case.weights.items() if n.startswith(f"{part}.")}
        save_file(state, root / part / "diffusion_pytorch_model.safetensors")
    return str(root)


def _system(case, folder):
    constructor = case.config["constructor"]
    text = {n: v for n, v in constructor["text"].items() if n in CLIPText.__dataclass_fields__}
    slot = Diffusion(
        autoencoder=FrameVAE(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
        denoiser=MotionUNet(
            weights=folder, motion=MotionModules(weights=folder, num_heads=4, max_length=8), sample_size=8, **SIZES
        ),
        conditions=(CLIPText(max_length=10, **text),),
        objective=Objective(beta_schedule="linear", beta_start=0.00085, beta_end=0.012),
    )
    system = slot.build()
    load_start(get("animatediff-full-tiny").but(system=slot), system.trained)
    for module, part in ((system.autoencoder, "vae"), (system.text.model, "text_encoder")):
        load_strict(
            module, {n.removeprefix(f"{part}."): t for n, t in case.weights.items() if n.startswith(f"{part}.")}
        )
    return system


def _close(found, expected, share):
    assert_close(found, expected.reshape(found.shape), rtol=0, atol=share * expected.abs().max().item())


class Recorded(Draw):
    """The numbers that the reference drew."""

    def __init__(self, case):
        super().__init__([0, 1], [0, 1], 2)
        self.case = case

    def noise(self, shape, name="noise"):
        found = self.case.inputs[NAMES[name]]
        return rearrange(found, "(b t) c h w -> b c t h w", b=2) if found.dim() == 4 else found

    def stratified(self, strata, name):
        return (self.case.inputs["timestep"] + 0.5) / 1000


def _batch(case):
    pixels = rearrange(case.inputs["pixels"], "b t c h w -> b c t h w")
    return {"pixel_values": pixels, "text_states": case.outputs["text_embeds"]}


def test_the_motion_unet_gives_the_numbers_and_gradients_of_stock_diffusers(case, folder):
    unet = _system(case, folder).denoiser.eval()
    x = case.inputs["x"].clone().requires_grad_()
    y = unet(x, case.inputs["t"], case.inputs["text"])
    _close(y, case.outputs["motion_unet"], 1e-5)
    (gradient,) = torch.autograd.grad((y * case.inputs["cotangent"]).sum(), x)
    _close(gradient, case.outputs["motion_unet_grad_x"], 5e-5)
    slot = StableDiffusionUNet(weights=folder, **SIZES)
    image = torch.nn.ModuleDict({"unet": slot.build().eval()})
    recipe = get("animatediff-image-finetune-tiny")
    load_start(
        recipe.but(system=recipe.system.but(denoiser=slot.but(context_dim=16), conditions=_like16(recipe))), image
    )
    with torch.no_grad():
        _close(
            image["unet"](case.inputs["x"], case.inputs["t"], case.inputs["text"]), case.outputs["unet2d_frames"], 1e-5
        )


def _like16(recipe):
    return (recipe.system.conditions[0].but(hidden_size=16),)


def test_a_training_step_has_the_reference_s_latents_loss_and_gradients(case, folder):
    system = _system(case, folder)
    with torch.no_grad():
        states = system.text.model(input_ids=case.inputs["input_ids"]).last_hidden_state
        _close(states, case.outputs["text_embeds"], 1e-5)
        latents = system.latents(_batch(case), Recorded(case))
        _close(latents, case.outputs["latents"], 1e-5)
        noisy = system.schedule.add_noise(latents, case.inputs["noise"], case.inputs["timestep"])
        _close(noisy, case.outputs["noisy_latents"], 1e-5)
    _close(system.schedule.alphas_cumprod.float(), case.outputs["alphas_cumprod"], 5e-6)
    loss, _ = system.loss(_batch(case), Recorded(case))
    _close(loss, case.outputs["loss"], 5e-6)
    loss.backward()
    own = learnt(system.denoiser)
    assert own.keys() == {name for name in case.config["gradient_norms"] if "motion_modules" in name}
    for name, parameter in own.items():
        expected = case.config["gradient_norms"][name]
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=2e-4, abs=2e-7), name


def test_four_updates_of_the_motion_modules_have_the_reference_s_losses_and_norms(case, folder):
    system = _system(case, folder)
    optim = AdamW(lr=1e-3, weight_decay=0.01, max_grad_norm=1.0)
    optimizer = optim.build(parameter_groups(system.trained, optim), fused=False)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    losses, norms = [], []
    for _ in range(4):
        loss, _ = system.loss(_batch(case), Recorded(case))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(learnt(system.denoiser).values(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(case.outputs["update_losses"].tolist(), rel=2e-5)
    assert norms == pytest.approx(case.outputs["update_grad_norms"].tolist(), rel=2e-4)


@torch.no_grad()
def test_our_sampling_gives_the_latents_and_frames_of_the_stock_pipeline(case, folder):
    system = _system(case, folder)
    system.mode(training=False)
    states = [
        system.text.model(input_ids=case.inputs[f"{kind}_ids"]).last_hidden_state for kind in ("prompt", "negative")
    ]
    slot, steps = StockDDIM(num_inference_steps=5, guidance_scale=7.5), []
    scheduler = slot.build(system.slot.objective)

    def run(scale):
        denoise = told(lambda x, t, text: system.denoiser(x, t, text), *states, scale)
        return sample(
            denoise, case.inputs["sample_start"], scheduler, num_inference_steps=5, on_step=lambda i, x: steps.append(x)
        )

    latents = run(7.5)
    assert scheduler.timesteps.tolist() == case.config["sample"]["timesteps"]
    _close(torch.stack(steps), case.outputs["sample_trajectory"], 5e-5)
    _close(latents, case.outputs["sample_latents"], 5e-5)
    _close(run(1.0), case.outputs["sample_latents_unguided"], 5e-5)
    frames = (system.pixels(latents) + 1) / 2
    assert_close(frames, rearrange(case.outputs["sample_frames"], "b t c h w -> b c t h w"), rtol=0, atol=5e-5)
