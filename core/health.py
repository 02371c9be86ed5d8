"""What this machine has for training: versions, device, decoders, attention kernels, space, the store."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from core.redact import redact
from core.tracking import DEFAULT_STORE, MANNERS, client, first_line, store_uri

LOW_DISK = 10.0
"""GB free below which a full-size run cannot keep its three checkpoints (a UNet of 550 M parameters has 9 GB each)."""


class Finding(NamedTuple):
    """One line of the report. `ok` False: something needs the user."""

    name: str
    text: str
    ok: bool = True


NO_STORE = Finding("store", f"{DEFAULT_STORE} does not exist yet; the first run makes it")


def findings(store: str | None) -> Iterator[Finding]:
    """All lines; none of them raises."""
    parts: tuple[Callable[[], Finding], ...] = (_python, _packages, _device, _attention, _video, _disk, _telemetry)
    for part in (*parts, lambda: _store(store)):
        try:
            yield part()
        except Exception as error:  # noqa: BLE001  a broken package raises anything, and is what this looks for
            yield Finding(getattr(part, "__name__", "store").strip("_"), f"{type(error).__name__}: {error}", ok=False)


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")


def _packages() -> Finding:
    names = ("torch", "diffusers", "transformers", "mlflow", "numpy")
    return Finding("packages", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def _device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("device", f"cpu, {torch.get_num_threads()} threads (torch sees no CUDA device)")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = ", ".join(f"{card.name} {card.total_memory / 2**30:.0f} GB" for card in cards)
    return Finding("device", f"cuda {torch.version.cuda}: {shown}")


def _attention() -> Finding:
    """Which back ends compute here, forward and backward."""
    import torch

    from core.attention import BACKENDS, resolve_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logging.getLogger("xformers").setLevel(logging.ERROR)  # seven lines about kernels of another torch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason why one does not work here
        works = {name: resolve_backend(name, device, dtype, 64) == name for name in BACKENDS}
    missing = [name for name, good in works.items() if not good]
    text = ", ".join(name for name, good in works.items() if good)
    return Finding("attention", f"{text} on {device}" + (f"; not here: {', '.join(missing)}" if missing else ""))


def _video() -> Finding:
    found = [f"PyAV {metadata.version('av')}"]
    try:
        importlib.import_module("decord")
        found.append(f"decord {metadata.version('decord')}")
    except (ImportError, OSError) as error:
        found.append(f"no decord ({first_line(error)})")
    return Finding("video", ", ".join(found))


def _disk() -> Finding:
    folder = Path("runs") if Path("runs").is_dir() else Path()
    free = shutil.disk_usage(folder).free / 1e9
    return Finding("disk", f"{free:.0f} GB free at {folder.absolute()}", ok=free >= LOW_DISK)


def _telemetry() -> Finding:
    name = "MLFLOW_DISABLE_TELEMETRY"
    value = os.environ.get(name, MANNERS[name])
    off = value.lower() in ("true", "1") or os.environ.get("DO_NOT_TRACK", "").lower() in ("true", "1")
    return Finding("telemetry", f"MLflow's is {'off' if off else 'on'}")


def _store(store: str | None) -> Finding:
    if store is None and "MLFLOW_TRACKING_URI" not in os.environ and not Path("runs/mlflow.db").is_file():
        return NO_STORE
    uri = store_uri(store)
    shown = redact(uri)
    try:
        experiments = client(uri).search_experiments()
    except UserError as error:
        return Finding("store", str(error), ok=False)
    except Exception as error:  # noqa: BLE001  a server that is down says so in many ways
        return Finding("store", f"{shown} does not answer ({first_line(error)})", ok=False)
    return Finding("store", f"{shown} answers, {len(experiments)} experiments")
