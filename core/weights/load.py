"""Trained weights into a module, wherever they are named: a folder, a checkpoint file, a hub id, `run:<id>`,
`shipped:<name>`, each with `ema:` or `raw:` before it where there are both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from core.errors import UserError, did_you_mean
from core.weights.fit import in_layout_of, load_strict
from core.weights.lazy import Lazy
from core.weights.names import component as component_of
from core.weights.names import folder_of, sort_out
from core.weights.networks import recognised
from core.weights.stored import Stored, open_stored

SHIPPED = Path(__file__).parent / "shipped"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
RUN_ID = re.compile(r"[0-9a-f]{32}")
KINDS = {"ema:": True, "raw:": False}


def locate(spec: str, component: str) -> Path:
    """The folder or file that `spec` names, for the network called `component` (`unet`, `vae`).

    Raises UserError when there is none, naming what was tried.
    """
    spec, averaged = split_kind(spec)
    if spec.startswith("shipped:"):
        return _component(_shipped(spec.removeprefix("shipped:")), component, averaged)
    path = Path(spec).expanduser()
    if spec.startswith("run:") or (RUN_ID.fullmatch(spec) and not path.exists()):
        return _component(_run_folder(spec.removeprefix("run:")), component, averaged)
    if path.exists():
        return _component(path, component, averaged)
    if HUB_ID.fullmatch(spec) and not spec.startswith((".", "/")):
        return _component(_from_hub(spec), component, averaged)
    raise UserError(
        f"weights {spec!r}: there is no such file or folder, and it is no hub id, run:<id> or shipped:<name>"
    )


def split_kind(spec: str) -> tuple[str, bool | None]:
    """`ema:` or `raw:` before a place, taken off; None where neither was said."""
    kind = next((kind for kind in KINDS if spec.startswith(kind)), "")
    return spec.removeprefix(kind), KINDS.get(kind)


def names_run(spec: str) -> bool:
    """Whether `spec` names a run or one of its checkpoints, not weights of others."""
    path = Path(spec).expanduser()
    if spec.startswith("run:") or (RUN_ID.fullmatch(spec) and not path.exists()):
        return True
    return (path / "state.json").is_file() or ((path / "recipe.json").is_file() and (path / "checkpoints").is_dir())


def read_component(
    where: str | Path, component: str, module: nn.Module | None = None
) -> tuple[dict[str, Lazy], dict[str, Any]]:
    """The tensors of one network, each read when it is asked for, and the config beside them (may be empty).

    With `module` (the meta device will do) names and layouts are those of the module: CompVis' names are translated,
    Paddle's matrices transposed. Whether everything fits is then for `fit.refuse_misfit` or `fit.load_strict` to say.
    """
    _, averaged = split_kind(str(where))
    stored = open_stored(where if isinstance(where, Path) else locate(str(where), component))
    return component_state(stored, component, averaged, module), stored.config


def component_state(
    stored: Stored, component: str, averaged: bool | None, module: nn.Module | None = None
) -> dict[str, Lazy]:
    """See `read_component`. `averaged` None: the average in a checkpoint of this project, raw weights in others'."""
    own = list(module.state_dict()) if module is not None else []
    contents = sort_out(stored.tensors, own)
    if averaged is None:
        averaged = stored.checkpoint and bool(contents.averaged)
    state = component_of(contents, component, averaged, own)
    if module is None and stored.paddle:
        raise UserError(
            f"{stored.path}: Paddle holds matrices transposed, and only the network tells which are matrices"
        )
    network = recognised(state)
    named = network.rename(state) if network else state
    return named if module is None else in_layout_of(module, named, stored.paddle)


def load_component(module: nn.Module, spec: str, component: str) -> dict[str, Any]:
    """Load the weights that `spec` names into `module`, every tensor accounted for. Returns the config stored with them
    (may be empty).

    Raises UserError for missing, unused or misshapen tensors.
    """
    state, config = read_component(spec, component, module)
    load_strict(module, state)
    return config


# -------------------------------------------------------------------------------------------------------------- places


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


def _component(path: Path, component: str, averaged: bool | None) -> Path:
    """Within a run's output directory or a pipeline folder: the network's own folder.

    The export of a run is averaged where the run has an average; raw weights, and those of a run that has no export
    yet, are in its newest checkpoint.
    """
    export = folder_of(path / "export", component)
    if export is not None and averaged is None:
        return export
    if (path / "recipe.json").is_file() and (path / "checkpoints").is_dir():
        from core.outputs import checkpoint_of

        return checkpoint_of(path)
    average = path / f"{component}_ema"
    return average if averaged and average.is_dir() else folder_of(path, component) or path


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    org, name, *rest = spec.split("/")
    inside = "/".join(rest)
    try:
        root = Path(snapshot_download(f"{org}/{name}", allow_patterns=[inside, f"{inside}/*"] if rest else None))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        folder = f"weights/{name}"
        raise UserError(
            f"weights {spec!r}: no such file or folder here, and the hub did not give it ({type(error).__name__}). "
            f"Where there is a network: hf download {org}/{name}{f' {inside}' if rest else ''} --local-dir {folder}; "
            f"then name {'/'.join([folder, *rest])}"
        ) from None
    if not root.joinpath(*rest).exists():
        raise UserError(f"weights {spec!r}: {org}/{name} has no {inside}")
    return root.joinpath(*rest)
