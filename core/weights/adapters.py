"""What is done with motion modules and LoRAs: taken out of a UNet, folded into one another, written in the layouts that
other programs open. A folder is written whole or not at all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.weights.fit import in_layout_of, refuse_misfit
from core.weights.folder import whole_folder, write_folder, write_weights
from core.weights.lazy import Lazy, lazily
from core.weights.lora import Lora, lora_of, refuse_unfit, write_lora, write_motion_lora
from core.weights.motion import COMPONENT, UNET, in_motion_module, original
from core.weights.names import parts, sort_out
from core.weights.networks import recognised
from core.weights.stored import open_stored

SINGLE_NAME = "motion_module.safetensors"
LAYOUTS = ("adapter", "comfyui", "lora", "motion-lora", "comfyui-lora")


@dataclass(frozen=True)
class Adapter:
    """The motion modules of a UNet: a MotionAdapter on the meta device, and its tensors, positions included."""

    module: nn.Module
    state: dict[str, Lazy]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.state.items()}


def open_adapter(path: Path) -> Adapter:
    """The motion modules in a folder or file, whatever their names. Raises UserError for anything else."""
    stored = open_stored(path)
    for state in parts(sort_out(stored.tensors)).values():
        network = recognised(state)
        if network is not None and COMPONENT in (network.component, network.becomes):
            named = network.rename(state)
            return _adapter({n: e for n, e in named.items() if re.match(network.takes, n)}, stored.config)
    raise UserError(f"{path}: no motion modules in it; `weights info` lists what there is")


def _adapter(state: Mapping[str, Lazy], config: Mapping[str, Any]) -> Adapter:
    assert UNET.kind
    try:
        with torch.device("meta"):
            module = UNET.kind()(**UNET.arguments(state, config))
    except (KeyError, IndexError, ValueError, TypeError, StopIteration) as error:
        raise UserError(f"motion modules whose sizes cannot be told ({type(error).__name__}: {error})") from None
    fitted = in_layout_of(module, state)
    refuse_misfit(module, fitted)
    return Adapter(module, fitted)


# ---------------------------------------------------------------------------------------------------- of a live module


def taken_from(unet: Any) -> tuple[Adapter, Lora | None]:
    """The motion modules of a UNetMotionModel, and the LoRA that PEFT put into it, if there is one (not merged)."""
    tensors = lazily(unet.state_dict())
    plain = {name.replace(".base_layer.", "."): entry for name, entry in tensors.items() if ".lora_" not in name}
    adapter = _adapter({name: entry for name, entry in plain.items() if in_motion_module(name)}, unet.config)
    return adapter, lora_of(unet, tensors)


# ------------------------------------------------------------------------------------------------------------- merging


def merged(adapter: Adapter, lora: Lora) -> Adapter:
    """The motion modules with the LoRA folded in: W + scale * B @ A, added in fp32, one matrix at a time as it is read.

    Raises UserError for a LoRA with layers that are not in these motion modules.
    """
    refuse_unfit(lora, adapter.shapes, "these motion modules")
    added = {
        f"{layer}.weight": _plus(adapter.state[f"{layer}.weight"], functools.partial(lora.update, layer))
        for layer in lora.layers
    }
    return Adapter(adapter.module, adapter.state | added)


def _plus(entry: Lazy, update: Any) -> Lazy:
    return Lazy(entry.shape, entry.dtype, functools.partial(_sum, entry, update))


def _sum(entry: Lazy, update: Any) -> Tensor:
    return (entry.read().float() + update()).to(entry.dtype)


# ------------------------------------------------------------------------------------------------------------- writing


def write_adapter(adapter: Adapter, folder: Path) -> Path:
    """Write what `MotionAdapter.from_pretrained` opens. Returns the weights' path."""
    return write_folder(adapter.module, folder, adapter.state)


def write_layout(layout: str, folder: Path, adapter: Adapter | None, lora: Lora | None) -> Path:
    """Write motion modules (with the LoRA folded in, where there is one) or the LoRA into `folder`, which must be new
    or empty. Returns the weights' path. Layouts: `LAYOUTS`.
    """
    if layout.endswith("lora"):
        if lora is None:
            raise UserError(f"--layout {layout}: there is no LoRA; adapter and comfyui are for motion modules")
    elif adapter is None:
        raise UserError(
            f"--layout {layout}: there are no motion modules; lora, motion-lora and comfyui-lora are for LoRA"
        )
    with whole_folder(folder) as partial:
        if lora is not None and layout.endswith("lora"):
            path = write_lora(lora, partial) if layout == "lora" else _as_motion_lora(lora, partial, layout)
        else:
            assert adapter
            told = merged(adapter, lora) if lora else adapter
            path = write_adapter(told, partial) if layout == "adapter" else _single(told, partial)
    return folder / path.name


def _as_motion_lora(lora: Lora, folder: Path, layout: str) -> Path:
    return write_motion_lora(lora, folder, original=layout == "comfyui-lora")


def _single(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return write_weights(folder, original(adapter.state), SINGLE_NAME)
