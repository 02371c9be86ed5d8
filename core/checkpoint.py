"""Checkpoints: one format at every number of ranks, written beside and renamed, so that what is there is whole.

A checkpoint is a folder `step-<n>`: the tensors as safetensors (torch.distributed.checkpoint's storage; each rank
writes its own shards) and `state.json` with everything that is a number. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from core.errors import UserError

if TYPE_CHECKING:
    from core.distributed import Ranks
    from core.ema import EMA

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")


def tensors(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer | None, ema: EMA | None) -> dict[str, Tensor]:
    """Every tensor of the training state by name: weights, buffers, moments of the optimizer, averages. Views, not
    copies.
    """
    state = {f"weights.{name}": t for name, t in modules.state_dict().items()}
    if ema is not None:
        state |= {f"ema.{name}": t for name, t in ema.average.items()}
    if optimizer is not None:
        for name, parameter in modules.named_parameters():
            for key, value in _moments(optimizer, parameter).items():
                state[f"optimizer.{key}.{name}"] = value
    return {name: t.detach() for name, t in state.items()}


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Tensors that the optimizer keeps for a parameter (its step counters are numbers, see `optimizer_steps`)."""
    return {
        k: v
        for k, v in optimizer.state.get(parameter, {}).items()
        if isinstance(v, Tensor) and v.dim() == parameter.dim()
    }


def optimizer_steps(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The optimizer's own update count of each parameter."""
    named = ((name, optimizer.state.get(p, {}).get("step")) for name, p in modules.named_parameters())
    return {name: float(step) for name, step in named if step is not None}


def materialise(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: dict[str, float]) -> None:
    """Give a fresh optimizer the state entries that a checkpoint will fill: one update with zero gradients and zero
    rate.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    wanted = [p for name, p in modules.named_parameters() if name in steps]
    for p in wanted:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for name, p in modules.named_parameters():
        if name in steps:
            optimizer.state[p]["step"].fill_(steps[name])


def save(folder: Path, state: dict[str, Tensor], numbers: dict[str, Any], ranks: Ranks, keep: int | None) -> Path:
    """Write checkpoint `step-<numbers['step']>` into `folder`; a collective. Older ones beyond `keep` go only when it
    is in place.
    """
    target = folder / f"step-{numbers['step']:08d}"
    partial = folder / f".partial-{target.name}"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _quiet():
        save_distributed(state, storage_writer=writer, no_dist=ranks.mesh is None)
    ranks.barrier()
    if ranks.first:
        (partial / "state.json").write_text(json.dumps({"format": FORMAT} | numbers, indent=1))
        _sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        _sync_folder(folder)
        for old in [] if keep is None else checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    ranks.barrier()
    return target


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    return next(iter(checkpoints(folder)), None)


def numbers_of(checkpoint: Path) -> dict[str, Any]:
    """The numbers of a checkpoint. Raises UserError for a file that is damaged or from a newer version."""
    path = checkpoint / "state.json"
    try:
        numbers = json.loads(path.read_text())
        version = numbers["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); resume from another checkpoint") from None
    if version > FORMAT:
        raise UserError(
            f"{path}: written by a newer version (format {version}, this one reads {FORMAT}); upgrade this package"
        )
    return numbers  # type: ignore[no-any-return]


def load(checkpoint: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `state` in place from a checkpoint, whatever number of ranks wrote it. Raises UserError when it does not
    fit.
    """
    try:
        with _quiet():
            load_distributed(
                state, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=ranks.mesh is None
            )
    except CheckpointException as error:  # a BaseException; it carries what each rank met
        reason = "; ".join(sorted({str(cause).strip().splitlines()[0] for cause, _ in error.failures.values()}))
        raise UserError(f"checkpoint {checkpoint}: does not fit this recipe, or is damaged: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no_dist.*|.*process group.*|.*single process.*")
        yield
