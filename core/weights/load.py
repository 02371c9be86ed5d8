"""Trained weights into a module, wherever they are named: a folder, a checkpoint file, a hub id, `run:<id>`,
`shipped:<name>`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from core.errors import UserError, did_you_mean
from core.files import read_json
from core.weights.lvdm import Part, load_strict, original_state, read_safetensors

SHIPPED = Path(__file__).parent / "shipped"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")


def locate(spec: str, component: str) -> Path:
    """The folder or file that `spec` names, for the network called `component` (`unet`, `vae`).

    Raises UserError when there is none, naming what was tried.
    """
    if spec.startswith("shipped:"):
        return _shipped(spec.removeprefix("shipped:"))
    if spec.startswith("run:"):
        return _component(_run_folder(spec.removeprefix("run:")), component)
    path = Path(spec).expanduser()
    if path.exists():
        return _component(path, component)
    if HUB_ID.fullmatch(spec) and not spec.startswith((".", "/")):
        return _component(_from_hub(spec), component)
    raise UserError(
        f"weights {spec!r}: there is no such file or folder, and it is no hub id, run:<id> or shipped:<name>"
    )


def load_component(module: nn.Module, spec: str, component: str) -> dict[str, Any]:
    """Load the weights that `spec` names into `module`, every tensor accounted for. Returns the config stored with them
    (may be empty).

    Raises UserError for missing, unused or misshapen tensors.
    """
    path = locate(spec, component)
    if path.is_dir():
        state, config = _diffusers_state(path), read_config(path)
    else:
        state, config = original_state(path, cast(Part, component)), {}
    load_strict(module, state)
    return config


def _shipped(name: str) -> Path:
    folder = SHIPPED / name
    known = [p.name for p in SHIPPED.iterdir() if p.is_dir()] if SHIPPED.is_dir() else []
    if name not in known:
        raise UserError(
            f"weights shipped:{name}: there is none of that name{did_you_mean(name, known)}; "
            f"shipped are {', '.join(known)}"
        )
    return folder


def _run_folder(run_id: str) -> Path:
    from core.tracking import fetch_output_dir

    return fetch_output_dir(run_id)


def _component(path: Path, component: str) -> Path:
    """Within a run's output directory or a pipeline folder: the network's own folder."""
    for folder in (path / "export" / component, path / component):
        if folder.is_dir():
            return folder
    return path


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    org, name, *rest = spec.split("/")
    try:
        root = Path(snapshot_download(f"{org}/{name}", allow_patterns=["/".join([*rest, "*"])] if rest else None))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"weights {spec!r}: no such file or folder here, and the hub did not give it ({type(error).__name__}). "
            f"Where there is a network: hf download {org}/{name} --local-dir weights/{name}; then name that folder"
        ) from None
    return root.joinpath(*rest)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a diffusers folder; empty where there is none. Raises UserError for what is no JSON
    object.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        config = read_json(path, 2**20)
    except (OSError, ValueError) as error:
        raise UserError(f"weights {path}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"weights {path}: expected a JSON object")
    return config


def _diffusers_state(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise UserError(f"weights {folder}: no .safetensors file in it (found {found})")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_safetensors(file)
    return state
