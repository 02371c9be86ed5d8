"""Which tensors of a checkpoint belong to which network: prefixes of frameworks, moving averages, bookkeeping."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from core.errors import UserError

T = TypeVar("T")

INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into names, anywhere."""
AROUND = ("state_dict.", "model_state_dict.", "module.", "weights.", "model.", "net.", "network.")
"""What stands before all names of a file: a dict in the checkpoint, DDP's wrapper, the attribute of a trainer."""
PARTS = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet."),
    "vae": ("first_stage_model.", "vae.", "vqvae."),
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.", "text_encoder."),
}
"""Networks of a full checkpoint: LDM's and LVDM's attributes, then PaddleMIX's and this project's."""
INDEX = "model_index.json"
"""Beside the folders of a stock pipeline: its class and theirs."""
FOLDERS = {"vae": ("vae", "vqvae"), "text_encoder": ("text_encoder", "bert")}
"""Folders of a network in a pipeline: this project's, and those of LDM's pipelines where they are others."""
AVERAGES = ("model_ema.", "ema_model.", "ema_state_dict.", "ema.")
COUNTERS = ("decay", "num_updates", "updates", "n_averaged")
TRAINING = re.compile(r"(optimizer|optim|lr_scheduler|scheduler|scaler|callbacks|loops|hyper_parameters|rng)\w*\.")
BUFFERS = {
    *("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "lvlb_weights", "logvar"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"),
    *("posterior_mean_coef1", "posterior_mean_coef2", "scale_factor", "n_averaged"),
}
"""Tables of the noise schedule and counters, which every recipe makes for itself."""
ADAPTER = "default"
"""peft's name of the only adapter that a network has here."""
SHOWN = 4


@dataclass(frozen=True)
class Contents(Generic[T]):
    """The tensors of a checkpoint sorted out: the networks' weights, their moving average, and what is no weight."""

    raw: dict[str, T]
    averaged: dict[str, T]
    left_out: dict[str, T]


def folder_of(pipeline: Path, part: str) -> Path | None:
    """The folder of a network in that of a pipeline, whatever it is called there."""
    return next((pipeline / name for name in FOLDERS.get(part, (part,)) if (pipeline / name).is_dir()), None)


def part_of(folder: str) -> str:
    """The network that a pipeline's folder of this name holds."""
    return next((part for part, names in FOLDERS.items() if folder in names), folder)


def sort_out(tensors: Mapping[str, T], own: Collection[str] = ()) -> Contents[T]:
    """Names without what frameworks add. `own` are the names of the network to load, which are left as they are."""
    names = {_plain(name): tensor for name, tensor in tensors.items()}
    kept = _under(names, "state_dict.") or names
    averages = {name.split(".", 1)[1]: t for name, t in kept.items() if name.startswith(AVERAGES)}
    weights = {name: t for name, t in kept.items() if not name.startswith(AVERAGES) and not _bookkeeping(name)}
    inner = _stripped(weights, own)
    raw = {name: t for name, t in inner.items() if name not in BUFFERS}
    averaged = {name: t for name, t in averages.items() if name not in COUNTERS}
    used = {id(t) for t in (*raw.values(), *averaged.values())}
    return Contents(raw, averaged, {name: t for name, t in names.items() if id(t) not in used})


def _bookkeeping(name: str) -> bool:
    return bool(TRAINING.match(name)) or name in BUFFERS


def _plain(name: str) -> str:
    for wrapper in INSIDE:
        name = name.replace(wrapper, "")
    return name


def _stripped(tensors: dict[str, T], own: Collection[str]) -> dict[str, T]:
    """Without what stands before every name, layer by layer."""
    for prefix in AROUND:
        if tensors and all(name.startswith(prefix) for name in tensors) and not any(n.startswith(prefix) for n in own):
            return _stripped(_under(tensors, prefix), own)
    return tensors


def _under(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def parts(contents: Contents[T]) -> dict[str, dict[str, T]]:
    """The networks of a full checkpoint by name; the key "" holds what is under no known prefix."""
    found: dict[str, dict[str, T]] = {}
    for name, tensor in contents.raw.items():
        part, prefix = next(((k, p) for k, ps in PARTS.items() for p in ps if name.startswith(p)), ("", ""))
        found.setdefault(part, {})[name.removeprefix(prefix)] = tensor
    return found


def component(contents: Contents[T], part: str, averaged: bool, own: Collection[str] = ()) -> dict[str, T]:
    """The tensors of one network, raw or averaged: those under its prefix in a full checkpoint, or all of a file that
    holds nothing else. Raises UserError where there are none.
    """
    found = parts(contents)
    raw = found.get(part) or (found.get("", {}) if found.keys() <= {""} else {})
    if averaged:
        return _moving_average(contents.averaged, part, list(raw) or list(own))
    if not raw:
        prefixes = " or ".join(PARTS.get(part, (f"{part}.",)))
        raise UserError(f"no {part} in this checkpoint: no name starts with {prefixes} ({some(contents.raw)})")
    return _stripped(raw, own)


def _moving_average(averages: Mapping[str, T], part: str, names: list[str]) -> dict[str, T]:
    """The averages of `names`. LDM's stand under names without dots, which cannot be read back, only looked up."""
    if not averages or not names:
        raise UserError(f"no moving average of {part}: expected names that start with {' or '.join(AVERAGES)}")
    spelt = {name: [f"{prefix}{name}" for prefix in ("", *PARTS.get(part, ()))] for name in names}
    found = {
        name: key
        for name, keys in spelt.items()
        for key in (*keys, *(k.replace(".", "") for k in keys))
        if key in averages
    }
    absent = [name for name in names if name not in found]
    if absent:
        raise UserError(f"the moving average lacks {len(absent)} of {len(names)} tensors: {some(absent)}")
    return {name: averages[key] for name, key in found.items()}


def without_peft(name: str) -> str:
    """A tensor's name without what peft puts into it where a layer has a LoRA."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def some(names: Iterable[str]) -> str:
    """The first few of a list of names."""
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
