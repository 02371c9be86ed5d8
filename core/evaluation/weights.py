"""Weights of feature networks from a local file: tensors only. A file that holds code is refused, never run."""

from __future__ import annotations

import zipfile
from pathlib import Path

from torch import Tensor, nn

from core.errors import UserError
from core.weights.stored import open_stored


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict (torch or safetensors). Raises UserError for what is none, and for TorchScript."""
    refuse_code(file)
    return {name: entry.read() for name, entry in open_stored(file).tensors.items()}


def refuse_code(file: Path) -> None:
    """TorchScript archives are programs: loading one runs what its author wrote."""
    if not file.is_file() or not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        inside = {name.partition("/")[2].partition("/")[0] for name in archive.namelist()}
    if inside & {"code", "constants.pkl"}:
        raise UserError(
            f"{file}: refused, this is TorchScript, which is code; give a state dict (.pt, .pth or .safetensors) of "
            "the same network"
        )


def fill(net: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Load all tensors by name. Raises UserError when names or shapes are of another network."""
    own = net.state_dict()
    counters = {
        name for name in own if name.endswith("num_batches_tracked")
    }  # older files have none, nothing reads them
    missing = [name for name in own if name not in weights and name not in counters]
    foreign = [name for name in weights if name not in own]
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    for what, found in (("lacks", missing), ("has besides", foreign), ("has another shape of", sorted(shapes))):
        if found:
            raise UserError(f"{file}: it {what} {len(found)} tensors of {type(net).__name__}, e.g. {found[0]}")
    net.load_state_dict(weights, strict=False)
