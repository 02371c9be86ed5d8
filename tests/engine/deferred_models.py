"""Small modules of every kind that constructors come in, built as usual or recorded and filled."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNetMotionModel
from torch import nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from core.deferred import recording
from core.fresh import Fresh
from registry import get
from tests.engine.deferred_ranks import CPU, SEED

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, "max_position_embeddings": 16}
TEXT |= {"hidden_size": 32, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99}
UNET = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8}
DOWN_UP = {"down": ("CrossAttnDownBlock{}", "DownBlock{}"), "up": ("UpBlock{}", "CrossAttnUpBlock{}")}
HEADS = {"num_attention_heads": 2, "motion_num_attention_heads": 2}
DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 1, "sample_size": 8}


def unet_blocks(kind):
    return {f"{way}_block_types": tuple(name.format(kind) for name in names) for way, names in DOWN_UP.items()}


def system_of(name):
    """Both halves of a recipe's system as one module, the frozen one in half precision."""
    system = get(name).system.build()
    return nn.ModuleDict({"trained": system.trained, "frozen": system.frozen.to(torch.bfloat16)})


class Assorted(nn.Module):
    """What layers of torch do at construction that others do not."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
        self.batch = nn.BatchNorm1d(4)
        self.orthogonal, self.old = nn.Linear(6, 4), nn.Parameter(torch.Tensor(3, 5))
        self.clipped = nn.Parameter(torch.empty(400).to(torch.float64))
        nn.init.orthogonal_(self.orthogonal.weight)
        nn.init.kaiming_uniform_(self.old)
        nn.init.trunc_normal_(self.clipped, std=0.5)
        nn.init.dirac_(self.spectral.parametrizations.weight.original.data[:, :, None])
        self.orthogonal.bias.data = torch.from_numpy(np.linspace(0, 1, 4)).float()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))
        nn.init.normal_(self.scale)
        self.mask = torch.ones(3, 3).triu(1).bool()
        self.old.data = self.old.data.cpu()
        self.to("cpu")


BUILDS = {
    "lvdm-short-sky-tiny": lambda: system_of("lvdm-short-sky-tiny"),
    "lvdm-video-vae-tiny": lambda: system_of("lvdm-video-vae-tiny"),
    "UNet2DConditionModel": lambda: UNet2DConditionModel(**UNET, attention_head_dim=4, **unet_blocks("2D")),
    "UNetMotionModel": lambda: UNetMotionModel(**UNET, **HEADS, **unet_blocks("Motion")),
    "AutoencoderKL": lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
    "DiTTransformer2DModel": lambda: DiTTransformer2DModel(**DIT, norm_num_groups=4),
    "CLIPTextModel": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    "T5EncoderModel": lambda: T5EncoderModel(T5Config(**T5, initializer_factor=3.0)),
    "BertModel": lambda: BertModel(BertConfig(**TEXT)),
    "torch's own layers": Assorted,
}


def recorded(build):
    with recording() as tape:
        module = build()
    return tape, module, Fresh(tape, module)


def filled(build, seed=SEED):
    _, module, fresh = recorded(build)
    fresh.fill(module, seed, CPU)
    return module


def ordinary(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build()


def tensors(module):
    return dict([*module.named_parameters(), *module.named_buffers()])
