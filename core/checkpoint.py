"""Checkpoints: one format at every number of ranks, and only whole ones count.

A checkpoint is a folder `step-<n>`: the tensors as safetensors (torch.distributed.checkpoint's storage; each rank
writes its own shards), `state.json` with everything that is a number, `recipe.json`, and `manifest.json` with the hash
of each file. No pickle is written or read. `core/saver.py` writes them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from core.distributed import local
from core.errors import UserError
from core.files import read_json
from core.manifest import LIMIT, damage
from core.meters import Window
from core.models.partly import kept

if TYPE_CHECKING:
    from core.distributed import Ranks
    from core.ema import EMA

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})")


def _is_count(value: Any, most: int = 2**53) -> bool:
    return type(value) is int and 0 <= value <= most


def _are_counts(value: Any) -> bool:
    """A pair, such as samples read and skipped."""
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_scaler(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and value[0] > 0 and _is_count(value[1])


def _is_window(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() | {"samples"} != vars(Window()).keys():
        return False
    counts, seconds, sums = ("updates", "skipped", "counted"), ("seconds", "data_s"), value["sums"]
    return (
        all(_is_count(value[name]) for name in counts)
        and _is_count(value.get("samples", 0))
        and all(_is_number(value[name]) for name in seconds)
        and isinstance(sums, dict)
        and all(type(number) in (int, float) for number in sums.values())
    )


def _are_prints(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


NUMBERS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "epoch": _is_count,
    "drawn": _is_count,
    "nonfinite": _are_counts,
    "samples": _are_counts,
    "scaler": _is_scaler,
    "ema_count": lambda value: value is None or _is_count(value),
    "optimizer_steps": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "threads": lambda value: _is_count(value, 1024) and value > 0,
    "world": lambda value: _is_count(value) and value > 0,
    "window": _is_window,
    "frozen": _are_prints,
}
"""What `state.json` must hold besides its format, and what is fit to go on with."""


def tensors(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer | None, ema: EMA | None) -> dict[str, Tensor]:
    """Every tensor of the training state by name: weights that learn, buffers, moments of the optimizer, averages.
    Views, not copies.
    """
    state = {f"weights.{name}.{key}": t for name, module in modules.items() for key, t in kept(module).items()}
    if ema is not None:
        state |= {f"ema.{name}": t for name, t in ema.average.items()}
    if optimizer is not None:
        for name, parameter in modules.named_parameters():
            for key, value in _moments(optimizer, parameter).items():
                state[f"optimizer.{key}.{name}"] = value
    return {name: t.detach() for name, t in state.items()}


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Tensors that the optimizer keeps for a parameter: not its step counters, which are numbers (`optimizer_steps`),
    nor the code books of 8-bit moments, which are the same for all and made anew.
    """
    return {
        k: v
        for k, v in optimizer.state.get(parameter, {}).items()
        if isinstance(v, Tensor) and v.dim() and not k.startswith("qmap")
    }


def optimizer_steps(modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The optimizer's own update count of each parameter that it keeps something for; 0 where it does not count."""
    named = ((name, optimizer.state.get(p)) for name, p in modules.named_parameters())
    return {name: float(state.get("step", 0)) for name, state in named if state}


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
        count = optimizer.state[p].get("step") if name in steps else None
        if isinstance(count, Tensor):
            count.fill_(steps[name])
        elif count is not None:
            optimizer.state[p]["step"] = int(steps[name])


def checkpoints(folder: Path) -> list[Path]:
    """Folders in `folder` that are named like a checkpoint, newest first; whether they are whole, `damage` says."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, or None, and a line on each newer one that is damaged."""
    lines: list[str] = []
    for path in checkpoints(folder):
        wrong = damage(path)
        if wrong is None:
            return path, lines
        lines.append(f"{path}: {wrong}")
    return None, lines


def numbers_of(checkpoint: Path) -> dict[str, Any]:
    """The numbers of a checkpoint. Raises UserError for a file that is damaged or from a newer version."""
    path = checkpoint / "state.json"
    try:
        numbers = read_json(path, LIMIT)
        version = int(numbers["format"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); resume from another checkpoint") from None
    if version > FORMAT:
        raise UserError(
            f"{path}: written by a newer version (format {version}, this one reads {FORMAT}); upgrade this package"
        )
    numbers.setdefault("frozen", {})  # what core/fingerprint.py found, which older versions did not write
    wrong = [name for name, fits in NUMBERS.items() if name not in numbers or not fits(numbers[name])]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} missing or not what a run writes; resume from another checkpoint")
    return numbers  # type: ignore[no-any-return]


class _Whole(DefaultLoadPlanner):
    """Refuses a checkpoint whose parts leave a gap in a tensor; torch's own planner leaves there what was before."""

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        filled: Counter[str] = Counter()
        for item in central_plan.items:
            filled[item.dest_index.fqn] += item.lengths.numel()
        for name, tensor in self.state_dict.items():
            if filled[name] < local(tensor).numel():
                raise ValueError(f"a part of {name} is missing")
        return super().finish_plan(central_plan)


def load(checkpoint: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `state` in place from a checkpoint, whatever number of ranks wrote it. Raises UserError when it does not
    fit.
    """
    try:
        with quiet():
            load_distributed(
                state,
                storage_reader=HuggingFaceStorageReader(str(checkpoint)),
                planner=_Whole(),
                no_dist=ranks.mesh is None,
            )
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint}: does not fit this recipe, or is damaged: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What happened, in a line. torch's CheckpointException (no Exception, but a BaseException) carries what each rank
    met.
    """
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return "; ".join(sorted({(str(cause).strip() or type(cause).__name__).splitlines()[0] for cause in causes}))


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remarks on checkpoints of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no_dist.*|.*process group.*|.*single process.*")
        yield
