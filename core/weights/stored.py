"""Opens whatever weights are stored in: a file or a folder of safetensors, torch or Paddle, by what is in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from core import files
from core.errors import UserError
from core.weights.lazy import Lazy, safetensors
from core.weights.paddle import read_pdparams
from core.weights.torch_file import read_torch

FIRST = (
    *("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin"),
    "model_state.pdparams",
)
"""The file of weights in a folder of diffusers, transformers or PaddleMIX, the first that is there."""
INDEXES = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pdparams")
CONFIGS = ("config.json", "model_config.json")
LIMIT = 16 * 2**20
"""Bytes of a json file."""
MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it",
    b"<!doctype html": "a web page, not weights: the download gave an error or a login page",
    b"<html": "a web page, not weights: the download gave an error or a login page",
}


@dataclass(frozen=True)
class Stored:
    """Weights as they are stored."""

    path: Path
    form: str
    """safetensors, torch, Paddle, or a checkpoint of this project."""
    tensors: dict[str, Lazy]
    config: dict[str, Any] = field(default_factory=dict)
    passed_over: list[str] = field(default_factory=list)
    """Classes in a pickle that were not made."""

    @property
    def paddle(self) -> bool:
        """Whether matrices are (in, out)."""
        return self.form == "Paddle"

    @property
    def checkpoint(self) -> bool:
        return self.form == "checkpoint"


def open_stored(path: Path) -> Stored:
    """Open a file, or the weights in a folder. Raises UserError for what is not there or is no weights."""
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected weights ({', '.join(SUFFIXES)}) or a folder with them")
    with path.open("rb") as file:
        head = file.read(64)
    for mark, what in MISTAKEN.items():
        if head.lower().startswith(mark):
            raise UserError(f"{path}: {what}")
    if path.suffix == ".pdparams":
        return Stored(path, "Paddle", read_pdparams(path))
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return Stored(path, "safetensors", _safetensors(path))
    tensors, passed_over = read_torch(path)
    return Stored(path, "torch", tensors, passed_over=passed_over)


def _safetensors(path: Path) -> dict[str, Lazy]:
    try:
        return safetensors(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A json object. Raises UserError when it is none."""
    try:
        value = files.read_json(path, LIMIT)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a json object")
    return value


# ------------------------------------------------------------------------------------------------------------- folders


def _open_folder(folder: Path) -> Stored:
    if (folder / "state.json").is_file():
        return Stored(folder, "checkpoint", _checkpoint(folder))
    config = next((read_json(folder / name) for name in CONFIGS if (folder / name).is_file()), {})
    for stem in INDEXES:
        for suffix in ("safetensors", "bin"):
            index = folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                return _open_shards(folder, index, config)
    stored = open_stored(_only(folder))
    return Stored(stored.path, stored.form, stored.tensors, config, stored.passed_over)


def _only(folder: Path) -> Path:
    """The file of weights in a folder; an error where it is not clear which."""
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    first = next((folder / name for name in FIRST if (folder / name) in files), None)
    if first is None and len(files) == 1:
        first = files[0]
    if first is None and files:
        raise UserError(f"weights {folder}: several files in it, name one: {', '.join(p.name for p in files[:6])}")
    if first is None:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"weights {folder}: no .safetensors, torch or .pdparams file in it (found {found})")
    return first


def _open_shards(folder: Path, index: Path, config: dict[str, Any]) -> Stored:
    """Weights in several files, with an index of which is where. Its names may not leave the folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: it has no weight_map")
    files = sorted({str(name) for name in names.values()})
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise UserError(f"{index}: refused, it names {outside[0]!r}, which is not in its folder")
    opened = [open_stored(folder / name) for name in files]
    tensors = {name: tensor for part in opened for name, tensor in part.tensors.items()}
    absent = [name for name in names if name not in tensors]
    if absent:
        raise UserError(f"{index}: {len(absent)} tensors are in none of its files, e.g. {absent[0]}")
    return Stored(index, opened[0].form, tensors, config)


def _checkpoint(folder: Path) -> dict[str, Lazy]:
    """The weights and averages of a checkpoint of this project, put together from the pieces of its ranks."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {folder}: damaged ({error})") from None
    pieces: dict[str, list[tuple[Path, tuple[int, ...]]]] = {}
    for index, info in metadata.storage_data.items():
        pieces.setdefault(index.fqn, []).append((Path(info.relative_path), tuple(index.offset)))
    opened = {file: _safetensors(file) for file in {file for found in pieces.values() for file, _ in found}}
    tensors = {}
    for name, found in pieces.items():
        if not name.startswith("optimizer."):
            whole: Any = metadata.state_dict_metadata[name]
            parts = [(opened[file][name], offset) for file, offset in found]
            tensors[name] = _together(tuple(whole.size), parts)
    return tensors


def _together(shape: tuple[int, ...], parts: list[tuple[Lazy, tuple[int, ...]]]) -> Lazy:
    first = parts[0][0]
    if len(parts) == 1 and first.shape == shape:
        return first
    return Lazy(shape, first.dtype, functools.partial(_assembled, shape, parts))


def _assembled(shape: tuple[int, ...], parts: list[tuple[Lazy, tuple[int, ...]]]) -> Tensor:
    whole = torch.empty(shape, dtype=parts[0][0].dtype)
    for part, offset in parts:
        whole[tuple(slice(at, at + n) for at, n in zip(offset, part.shape, strict=True))] = part.read()
    return whole
