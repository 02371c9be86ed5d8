"""The slot classes of a recipe, by kind. Nothing here imports torch."""

from core.slots.autoencoder import Autoencoder, FrameVAE, VideoVAE
from core.slots.checkpoint import Checkpoint
from core.slots.condition import CLIPText, Condition, LDMBert
from core.slots.data import Data
from core.slots.denoiser import Denoiser, LDMUNet, LVDMShortUNet, LVDMTextUNet, OpenSoraDiT
from core.slots.free import FreeInit, FreeNoise
from core.slots.launch import Launch
from core.slots.loop import Loop
from core.slots.metric import ColourAndMotion, Metric
from core.slots.motion import LoRA, MotionModules, MotionUNet, StableDiffusionUNet
from core.slots.objective import Objective
from core.slots.optim import EMA, AdamW, AdamW8bit, Lion, Optim, ParamGroup, Schedule
from core.slots.parallel import Parallel
from core.slots.recipe import RECIPES, Recipe, register
from core.slots.sampler import (
    DDIM,
    DDPM,
    LMS,
    PNDM,
    DPMSolverMultistep,
    Euler,
    EulerAncestral,
    FlowMatchEuler,
    Heun,
    Sampler,
    StockDDIM,
    UniPC,
)
from core.slots.slot import Slot, SlotError
from core.slots.system import Autoencoding, Diffusion, System
from core.slots.tracking import Tracking
from core.slots.validation import Validation

__all__ = [
    "DDIM",
    "DDPM",
    "EMA",
    "LMS",
    "PNDM",
    "RECIPES",
    "AdamW",
    "AdamW8bit",
    "Autoencoder",
    "Autoencoding",
    "CLIPText",
    "Checkpoint",
    "ColourAndMotion",
    "Condition",
    "DPMSolverMultistep",
    "Data",
    "Denoiser",
    "Diffusion",
    "Euler",
    "EulerAncestral",
    "FlowMatchEuler",
    "FrameVAE",
    "FreeInit",
    "FreeNoise",
    "Heun",
    "LDMBert",
    "LDMUNet",
    "LVDMShortUNet",
    "LVDMTextUNet",
    "Launch",
    "Lion",
    "LoRA",
    "Loop",
    "Metric",
    "MotionModules",
    "MotionUNet",
    "Objective",
    "OpenSoraDiT",
    "Optim",
    "Parallel",
    "ParamGroup",
    "Recipe",
    "Sampler",
    "Schedule",
    "Slot",
    "SlotError",
    "StableDiffusionUNet",
    "StockDDIM",
    "System",
    "Tracking",
    "UniPC",
    "Validation",
    "VideoVAE",
    "register",
]
