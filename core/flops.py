"""FLOPs of an update, counted on meta tensors, and what share they are of what the device can do (MFU, arXiv
2204.02311, appendix B).

Counted are matrix products, convolutions and attention (torch's FlopCounterMode), a multiplication and an addition as
two; what works on single elements is not. Attention counts as its four products, whatever a kernel computes twice.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from core.attention import set_attention
from core.blocks import OPERATORS, checkpoint_blocks
from core.draw import Draw
from core.precision import DTYPES
from core.slots import Loop, Recipe
from core.systems import System

Shapes = tuple[tuple[str, Any], ...]
"""What decides the FLOPs of a batch: names, shapes and dtypes of its tensors; texts by their number."""

DATA_SHEET: dict[str, tuple[float, float, float]] = {
    "V100-SXM2": (125.0, 15.7, 15.7),
    "A100": (312.0, 156.0, 19.5),
    "A10": (125.0, 62.5, 31.2),
    "L40S": (362.0, 183.0, 91.6),
    "H100 80GB HBM3": (989.4, 494.7, 66.9),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
}
"""TFLOP/s of dense matrix products in half precision, TF32 and fp32, by part of the device's name: NVIDIA's data sheets
of each, boost clock, without sparsity.
"""
SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices whose product is measured."""
MEASURED_S = 0.2


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch, frozen encoders included. `again` is what checkpointing computes a second time."""

    forward: int
    backward: int
    again: int

    @property
    def model(self) -> int:
        """What the update needs, however it is computed."""
        return self.forward + self.backward

    def __str__(self) -> str:
        parts = {"forward": self.forward, "backward": self.backward, "recomputed": self.again}
        return ", ".join(f"{value / 1e12:.3g} TFLOP {name}" for name, value in parts.items())


class Attention(TorchFunctionMode):
    """Knows whether the operators of now are those of attention: on meta it falls apart into products."""

    def __init__(self, done: Callable[[Tensor], None] = lambda out: None) -> None:
        super().__init__()
        self.inside = False
        self._done = done

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.inside = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self.inside = False
        self._done(out)
        return out


def on_meta(recipe: Recipe) -> System:
    """The system without values, in training, with attention as it is written where the recipe asks for that."""
    with torch.device("meta"):
        system = recipe.system.build()
    system.mode(training=True)
    if recipe.system.attention == "eager":
        set_attention(system.trained, "eager")
    return system


def count(recipe: Recipe, shapes: Shapes) -> Flops:
    """FLOPs of the forward and backward pass of one batch of these shapes."""
    system, batch = on_meta(recipe), _batch(shapes)
    forward, backward = _passes(system, batch)
    if not recipe.loop.activation_checkpointing:
        return Flops(forward, backward, 0)
    attention = Attention()
    checkpoint_blocks(system, recipe.loop, _contexts(recipe.loop, attention))
    with attention:
        _, more = _passes(system, batch)
    return Flops(forward, backward, more - backward)


def _contexts(loop: Loop, attention: Attention) -> Callable[[], Any]:
    """What `core/blocks.py` keeps, where attention is no operator of its own."""
    kept = [operator for name in loop.recompute_keep for operator in OPERATORS[name]]

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = "attention" in loop.recompute_keep if attention.inside else operator in kept
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def _passes(system: System, batch: dict[str, Any]) -> tuple[int, int]:
    """FLOPs forward and backward."""
    places = batch["place"]
    with FlopCounterMode(display=False) as counted:
        loss, _ = system.loss(batch, Draw.training(0, 0, places, len(places), "meta"))
        forward = counted.get_total_flops()
        loss.backward()  # type: ignore[no-untyped-call]
        both = counted.get_total_flops()
    system.trained.zero_grad(set_to_none=True)
    return forward, both - forward


def shapes_of(batch: dict[str, Any]) -> Shapes:
    """The shapes of a batch, to count and to remember by."""
    parts = {name: value for name, value in batch.items() if name != "bad"}
    found = ((k, (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else len(v)) for k, v in parts.items())
    return tuple(sorted(found))


def shapes_for(recipe: Recipe) -> Shapes:
    """Those of a micro-batch of the recipe's own data."""
    micro = recipe.loop.micro_batch
    video = ((micro, 3, *recipe.data.clip_shape()), torch.float32)
    return (("caption", micro), ("id", micro), ("pixel_values", video), ("place", micro))


def _batch(shapes: Shapes) -> dict[str, Any]:
    """Tensors without values; empty texts; places."""
    made: dict[str, Any] = {}
    for name, shape in shapes:
        if isinstance(shape, tuple):
            made[name] = torch.empty(shape[0], dtype=shape[1], device="meta")
        else:
            made[name] = list(range(shape)) if name == "place" else [""] * shape
    return made


# ----------------------------------------------------------------------------------------------------- what is possible


def data_sheet(device: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s of a device by its name; None where it is not known, or a part of one (MIG)."""
    if "MIG" in device:
        return None
    known = next((peaks for name, peaks in DATA_SHEET.items() if device.split("NVIDIA ")[-1].find(name) >= 0), None)
    return None if known is None else 1e12 * known[(2 - tf32) if precision == "fp32" else 0]


@functools.cache
def measured(device: torch.device, precision: str, tf32: bool, threads: int) -> float:
    """FLOP/s of the fastest of some products of square matrices, in the dtype of the autocast and with TF32 as set."""
    side = SIDE.get(device.type, SIDE["cpu"])
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    times = [_seconds(a, b) for _ in range(2)][1:]
    while sum(times) < MEASURED_S:
        times.append(_seconds(a, b))
    return 2 * side**3 / min(times)


def _seconds(a: Tensor, b: Tensor) -> float:
    began = time.perf_counter()
    (a @ b)[0, 0].item()
    return time.perf_counter() - began


class Utilisation:
    """What a rank has computed since the last log, against what its device can do. FLOPs are counted once a shape."""

    def __init__(self, recipe: Recipe, device: torch.device, said: Callable[[str], None] = lambda line: None) -> None:
        self.recipe, self.device, self._said = recipe, device, said
        self._known: dict[Shapes, Flops] = {}
        self._seen: Counter[Shapes] = Counter()
        self._seconds = 0.0

    def add(self, batch: dict[str, Any]) -> None:
        """A micro-batch of the update that is running."""
        if self.recipe.loop.mfu:
            self._seen[shapes_of(batch)] += 1

    def end_update(self, seconds: float) -> None:
        """An update took so long, all its micro-batches together."""
        self._seconds += seconds

    def values(self) -> dict[str, float]:
        """The metrics since they were last asked for: TFLOP/s of this rank, and MFU."""
        if not self._seen or not self._seconds:
            return {}
        flops = sum(self._flops(shapes).model * number for shapes, number in self._seen.items())
        rate = flops / self._seconds
        self._seen.clear()
        self._seconds = 0.0
        loop = self.recipe.loop
        found = {"tflops_per_s": rate / 1e12}
        found["mfu/measured"] = rate / measured(self.device, loop.precision, loop.tf32, torch.get_num_threads())
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if peak := data_sheet(name, loop.precision, loop.tf32):
            found["mfu/data_sheet"] = rate / peak
        return found

    def _flops(self, shapes: Shapes) -> Flops:
        if shapes not in self._known:
            self._known[shapes] = count(self.recipe, shapes)
            sizes = " ".join(f"{k} {'x'.join(map(str, v[0]))}" for k, v in shapes if isinstance(v, tuple))
            self._said(f"a micro-batch of {sizes}: {self._known[shapes]}")
        return self._known[shapes]
