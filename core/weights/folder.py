"""A network as a diffusers folder: `config.json` and one safetensors file, which `from_pretrained` opens."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.weights.lazy import DTYPES, Lazy, lazy

NAME = "diffusion_pytorch_model.safetensors"
OWN = {"config.json", NAME, "README.md"}
"""Files of a MotionAdapter folder. One with others in it is not replaced."""
SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


def write_folder(module: Any, folder: Path, state: Mapping[str, Tensor | Lazy]) -> Path:
    """Write the configuration of a diffusers `module` with the weights `state` (its own `save_pretrained` takes none).
    Returns the weights' path.

    A module may say that its file is called otherwise (`weights_name`), and that more is stored (`stored`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    module.save_config(folder)
    config = folder / "config.json"  # a network that is spread over ranks has a class of torch's own making
    config.write_text(config.read_text().replace('"_class_name": "FSDP', '"_class_name": "'))
    stored = getattr(module, "stored", dict)
    return write_weights(folder, stored(state), getattr(module, "weights_name", NAME))


def write_weights(
    folder: Path, state: Mapping[str, Tensor | Lazy], name: str = NAME, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write the weights alone, readable by everyone, one tensor at a time: safetensors' own writer holds all of them in
    memory, and their bytes once more. `metadata` goes into the header.
    """
    entries = {n: t if isinstance(t, Lazy) else lazy(t) for n, t in state.items()}
    order = sorted(entries, key=lambda n: (-entries[n].dtype.itemsize, n))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
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


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Where to write a folder that a reader finds whole or not at all: it gets its name at the end.

    Raises UserError at once for a folder that is there and not empty, unless `replace` and it is a MotionAdapter's.
    """
    folder = folder.absolute()
    partial, aside = (folder.with_name(f".{kind}-{folder.name}") for kind in ("partial", "replaced"))
    if aside.is_dir() and not folder.exists():  # of a replacement that was killed between its two renames
        aside.rename(folder)
    _refuse_taken(folder, replace)
    for left in (partial, aside):
        shutil.rmtree(left, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(aside)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_taken(folder: Path, replace: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--to {folder}: a file or a link is there; name a folder")
    held = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if held and not replace:
        raise UserError(f"--to {folder} is not empty: name another folder, or --replace-if-exists where a merge goes")
    if held and not ({"config.json", NAME} <= held <= OWN):
        raise UserError(f"--to {folder}: not replaced, it is no MotionAdapter's ({', '.join(sorted(held)[:4])})")
