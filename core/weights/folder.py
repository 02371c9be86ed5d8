"""A network as a diffusers folder: `config.json` and one safetensors file, which `from_pretrained` opens."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.weights.lazy import DTYPES, Lazy, lazy

NAME = "diffusion_pytorch_model.safetensors"
SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


def write_folder(module: Any, folder: Path, state: Mapping[str, Tensor | Lazy]) -> Path:
    """Write the configuration of a diffusers `module` with the weights `state` (its own `save_pretrained` takes none).
    Returns the weights' path.

    A module may say that its file is called otherwise (`weights_name`), and that more is stored (`stored`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)
    stored = getattr(module, "stored", dict)
    return write_weights(folder, stored(state), getattr(module, "weights_name", NAME))


def write_weights(
    folder: Path, state: Mapping[str, Tensor | Lazy], name: str = NAME, about: Mapping[str, str] | None = None
) -> Path:
    """Write the weights alone, readable by everyone, one tensor at a time: safetensors' own writer holds all of them in
    memory, and their bytes once more. `about` goes into the header.
    """
    entries = {n: t if isinstance(t, Lazy) else lazy(t) for n, t in state.items()}
    order = sorted(entries, key=lambda n: (-entries[n].dtype.itemsize, n))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(about or {})}
    at = 0
    for n in order:
        size = entries[n].numel * entries[n].dtype.itemsize
        shape = list(entries[n].shape)
        header[n] = {"dtype": SAFETENSORS[entries[n].dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = folder / name
    partial = folder / f".partial-{name}"
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for n in order:
            file.write(_bytes(entries[n].read()))
    partial.chmod(0o644)
    return partial.replace(path)


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data
