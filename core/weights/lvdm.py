"""Reads the checkpoints of LVDM's authors and loads them into the networks here, all of it or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.errors import UserError

Part = Literal["unet", "unet_ema", "vae"]
PREFIXES = {"unet": "model.diffusion_model.", "unet_ema": "model_ema.", "vae": "first_stage_model."}
SHOWN = 4


def original_state(source: str | Path | Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """One part's tensors under the names of the networks here, from a `.safetensors`, a torch checkpoint or a dict.

    A part is found under its prefix in a full checkpoint, or bare. The loss network, schedule buffers and the second
    name of each padded convolution's kernel are dropped. "unet_ema" is the moving average, stored under names without
    dots.
    """
    tensors = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    if part == "unet_ema":
        return _moving_average(tensors)
    found = _under(tensors, PREFIXES[part])
    if not found and _whole(tensors):
        raise UserError(f"no {part} in this checkpoint: no name starts with {PREFIXES[part]} ({_some(tensors)})")
    return _without_aliases(_parameters(found or tensors))


def _whole(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that only a full checkpoint has."""
    return [name for name in tensors if name.startswith((*PREFIXES.values(), "cond_stage_model."))]


def _parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the loss network and the schedule's buffers, whose names have no dot."""
    return {name: value for name, value in tensors.items() if "." in name and not name.startswith("loss.")}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .safetensors, .ckpt, .pt or .bin checkpoint")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    _refuse_compressed(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: not opened, a checkpoint may hold tensors and plain values only ({reason})"
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: no checkpoint, it holds a {type(loaded).__name__} and no names of tensors")
    return {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}


def _refuse_compressed(path: Path) -> None:
    """torch writes its archives without compression; one whose parts are larger than itself would fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: not opened, a damaged archive ({error})") from None
    if size > path.stat().st_size:
        raise UserError(f"{path}: not opened, its parts are larger than the file ({size:,} bytes)")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError for one that is damaged or no such file."""
    try:
        if not path.is_file():
            raise OSError("no ordinary file")
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({str(error).splitlines()[0]})") from None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _without_aliases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops X.weight where X.conv.weight is the same kernel."""
    return {name: value for name, value in state.items() if f"{name.removesuffix('weight')}conv.weight" not in state}


def _moving_average(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages, named by the raw weights of the same checkpoint: without its dots a name cannot be read back."""
    averages = _under(tensors, PREFIXES["unet_ema"])
    names = [name for name in tensors if name.startswith(PREFIXES["unet"])]
    flat = {name.removeprefix("model.").replace(".", ""): name.removeprefix(PREFIXES["unet"]) for name in names}
    if not averages or not flat:
        raise UserError("no moving average: expected names that start with model_ema. beside model.diffusion_model.")
    absent = [name for key, name in flat.items() if key not in averages]
    if absent:
        raise UserError(f"the moving average lacks {len(absent)} of {len(flat)} tensors: {_some(absent)}")
    return {name: averages[key] for key, name in flat.items()}


def load_strict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies the state into the module, or raises UserError that names what is missing, unused or of another shape."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unused = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    wrong = {"missing": missing, "unused": unused, "misshapen": misshapen}
    if any(wrong.values()):
        said = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in wrong.items() if names)
        raise UserError(f"these weights are not {type(module).__name__}'s ({len(own)} tensors): {said}")
    module.load_state_dict(state)


def _some(names: Mapping[str, Tensor] | list[str]) -> str:
    shown = list(names)[:SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")
