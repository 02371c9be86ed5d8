"""A network as a diffusers folder: `config.json` and one safetensors file, which `from_pretrained` opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

NAME = "diffusion_pytorch_model.safetensors"


def write_folder(module: Any, folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write the configuration of a diffusers `module` with the weights `state` (its own `save_pretrained` takes none).
    Returns the weights' path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)
    return write_weights(folder, state)


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write the weights alone, readable by everyone (safetensors writes for the owner only)."""
    path = folder / NAME
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)
    return path
