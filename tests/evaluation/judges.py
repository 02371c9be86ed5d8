"""Networks that judge, as files in their published layouts with random weights."""

import json
import shutil
from pathlib import Path

import torch
from torchvision.models import inception_v3
from transformers import CLIPConfig, CLIPModel

from core.evaluation.i3d import Network
from core.weights.load import SHIPPED

TOKENIZER = SHIPPED / "clip-text-tiny" / "tokenizer"


def torchvision_net() -> torch.nn.Module:
    """Inception-v3 of 1000 classes."""
    torch.manual_seed(0)
    return inception_v3(weights=None, aux_logits=True, init_weights=False, transform_input=False).eval()


def write_inception(file: Path) -> Path:
    """torchvision's state dict."""
    torch.save(torchvision_net().state_dict(), file)
    return file


def write_i3d(file: Path) -> Path:
    """A state dict with the names of rgb_imagenet.pt."""
    torch.manual_seed(0)
    torch.save(Network().state_dict(), file)
    return file


def write_clip(folder: Path) -> Path:
    """A full CLIP at tiny size with the shipped tokenizer, as transformers writes it."""
    words = len(json.loads((TOKENIZER / "vocab.json").read_text()))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": words, "max_position_embeddings": 77, "eos_token_id": words - 1}
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder
