"""The networks here with the weights of a recorded run, through the importer."""

import inspect

import torch

from core.models.lvdm_text_unet import LVDMTextUNet
from core.models.lvdm_unet import LVDMUNet
from core.models.video_vae import VideoAutoencoder
from core.weights.lvdm import load_strict, original_state
from core.weights.paddle import paddle_state
from tests.parity.recorded import GOLDEN, Case


def short_unet(case: Case) -> LVDMUNet:
    return _unet(LVDMUNet, case)


def text_unet(case: Case) -> LVDMTextUNet:
    return _unet(LVDMTextUNet, case)


def paddle_text_unet(case: Case, name: str) -> LVDMTextUNet:
    """From the file that Paddle wrote."""
    unet = empty_unet(LVDMTextUNet, case)
    load_strict(unet, paddle_state(GOLDEN / name / "model_state.pdparams", unet))
    return unet


def _unet(kind, case: Case):
    unet = empty_unet(kind, case)
    load_strict(unet, original_state({f"model.diffusion_model.{k}": v for k, v in case.weights.items()}, "unet"))
    return unet


def empty_unet(kind, case: Case):
    """A UNet of the recorded run's sizes, with fresh weights."""
    known = inspect.signature(kind.__init__).parameters
    return kind(**{name: value for name, value in case.config["constructor"].items() if name in known}).eval()


def video_vae(case: Case) -> VideoAutoencoder:
    options = case.config["constructor"]["ddconfig"]["encoder"]["params"]
    vae = VideoAutoencoder(
        n_hiddens=options["n_hiddens"],
        downsample=options["downsample"],
        z_channels=options["z_channels"],
        embed_dim=case.config["constructor"]["embed_dim"],
        scale_factor=case.config["scale_factor"],
        shift_factor=case.config["shift_factor"],
    ).eval()
    twice_named = case.weights | {alias: case.weights[name] for alias, name in case.config["aliases"].items()}
    full = {f"first_stage_model.{k}": v for k, v in twice_named.items()} | {"betas": torch.zeros(3)}
    load_strict(vae, original_state(full, "vae"))
    return vae
