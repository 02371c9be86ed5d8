"""`python -m benchmarks.gpu`: updates of the full-size recipes on one CUDA device, in one call of less than 8 minutes.

Weights are random and batches are noise, so nothing need be downloaded; speed and memory do not depend on values. One
thing is changed at a time: attention, checkpointing, compilation, precision, the layout of convolutions. No row is
started that would not end in time; rows that did not fit, in time or in memory, are named.

    python -m benchmarks.gpu                                  # writes the table into docs/performance.md
    python -m benchmarks.gpu --device cpu --tiny --rows bf16  # the twins, to try it out; prints
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from core.attention import choose_attention
from core.blocks import prepare_blocks
from core.build import parameter_groups
from core.distributed import choose_device
from core.draw import Draw
from core.ema import EMA
from core.flops import count, data_sheet, measured, shapes_for
from core.meters import memory_gb
from core.models.partly import learnt
from core.precision import DTYPES, Scaler, autocast
from core.slots import EMA as EMASlot
from core.slots import Recipe
from core.systems import System
from registry import get

MICRO = {"lvdm-short-sky": 8, "ldm-laion400m": 16, "animatediff-full": 2}
"""Recipes, and samples of a batch."""
ROWS: dict[str, str] = {
    "bf16": "",
    "fp32 (TF32)": "--precision fp32",
    "every block recomputed": "--loop.activation-checkpointing True",
    "attention eager": "--system.attention eager",
    "attention flash": "--system.attention flash",
    "attention xformers": "--system.attention xformers",
    "fp16": "--precision fp16",
    "every second block recomputed": "--loop.activation-checkpointing True --loop.recompute-every 2",
    "recomputed but products, attention, convolutions": (
        "--loop.activation-checkpointing True --loop.recompute-keep products attention convolutions"
    ),
    "channels last": "",
    "compiled": "--loop.compile True",
    "compiled, every block recomputed": "--loop.compile True --loop.activation-checkpointing True",
}
"""What is changed, in the order in which it is measured: the flags."""
WARM, UPDATES, MEASURED_S = 2, 10, 2.0
ROW_S, COMPILED_S = 15.0, 120.0
"""Seconds that must be left for a row to be started."""
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- gpu table: begin -->", "<!-- gpu table: end -->"
HEAD = (
    "recipe",
    "what",
    "batch",
    "s an update",
    "samples/s",
    "TFLOP/s",
    "MFU, data sheet",
    "MFU, measured",
    "GiB",
    "syncs",
)


@dataclass(frozen=True)
class Measured:
    """One row. Memory is the peak in GiB; `syncs` are the times that an update waits for the device, besides the one
    fetch at its end (None: not on CUDA).
    """

    batch: int
    seconds: float
    flops: int
    memory: float
    syncs: int | None

    def cells(self, sheet: float | None, peak: float) -> list[str]:
        """As they stand in the table."""
        rate = self.flops / self.seconds
        return [
            str(self.batch),
            f"{self.seconds:.3g}",
            f"{self.batch / self.seconds:.3g}",
            f"{rate / 1e12:.3g}",
            f"{rate / sheet:.1%}" if sheet else "-",
            f"{rate / peak:.1%}",
            f"{self.memory:.1f}",
            "-" if self.syncs is None else str(self.syncs),
        ]


def main(words: Sequence[str] | None = None) -> None:
    asked = _parser().parse_args(words)
    out = asked.out or (None if asked.tiny else PAGE)
    device, began = choose_device(asked.device), time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for name, what in [(name, what) for what in asked.rows for name in asked.only]:
        need = COMPILED_S if "compile" in ROWS[what] else ROW_S
        left = asked.budget - (time.perf_counter() - began)
        cells = _row(name, what, asked.tiny, device) if left >= need else ["not started: no time left"]
        lines.append(f"| {' | '.join([name + '-tiny' * asked.tiny, what, *cells])} |")
        print(lines[-1], flush=True)
    text = "\n".join([_machine(device), "", *lines])
    if out is not None:
        write(out, text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed and memory of the full-size recipes on one device.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny twins")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which no row is started")
    parser.add_argument("--only", nargs="+", choices=tuple(MICRO), default=tuple(MICRO), help="recipes")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), help="what is changed")
    parser.add_argument("--out", type=Path, help="page with the marks; without --tiny: docs/performance.md")
    return parser


def _row(name: str, what: str, tiny: bool, device: torch.device) -> list[str]:
    """The cells of one row, or why there are none."""
    micro = 2 if tiny else MICRO[name]
    recipe = chosen(f"{name}{'-tiny' * tiny}", what, micro)
    try:
        found = _measure(recipe, device, channels_last=what == "channels last")
    except torch.OutOfMemoryError:
        return [str(micro), "out of memory"]
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.compiler.reset()
    sheet = data_sheet(_name(device), recipe.loop.precision, True)
    return found.cells(sheet, measured(device, recipe.loop.precision, True, torch.get_num_threads()))


def chosen(name: str, what: str, micro: int) -> Recipe:
    """The recipe of a row, with constants of its latents where they would come with the weights."""
    precision = "" if "--precision" in ROWS[what] else "--precision bf16"
    recipe = get(f"{name} {precision} --global-batch {micro} --batch-size {micro} {ROWS[what]}")
    system: Any = recipe.system
    if system.autoencoder.scale_factor is None:
        system = system.but(autoencoder=system.autoencoder.but(scale_factor=1.0, shift_factor=0.0))
    return recipe.but(system=system)


def _measure(recipe: Recipe, device: torch.device, channels_last: bool) -> Measured:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    update = _update(recipe, device, channels_last)
    for _ in range(WARM):
        update().tolist()
    times: list[float] = []
    while len(times) < UPDATES and (sum(times) < MEASURED_S or len(times) < 2):
        began = time.perf_counter()
        update().tolist()
        times.append(time.perf_counter() - began)
    return Measured(
        batch=recipe.loop.micro_batch,
        seconds=statistics.median(times),
        flops=count(recipe, shapes_for(recipe)).model,
        memory=memory_gb(device),
        syncs=_syncs(update) if device.type == "cuda" else None,
    )


def _update(recipe: Recipe, device: torch.device, channels_last: bool) -> Callable[[], Tensor]:
    """One update as the loop does it: loss and norm, on the device."""
    system, loop = _system(recipe, device, channels_last), recipe.loop
    parameters = list(learnt(system.trained).values())
    optimizer = recipe.optim.build(parameter_groups(system.trained, recipe.optim), fused=True)
    ema, scaler, steps = EMA(recipe.optim.ema or EMASlot(), system.trained), Scaler(loop.precision), iter(range(10**6))
    shapes = dict(shapes_for(recipe))
    video = torch.randn(shapes["pixel_values"][0], device=device).clamp_(-1, 1)
    places = list(range(loop.micro_batch))
    batch = {"pixel_values": video, "caption": [""] * len(places), "id": [""] * len(places), "place": places}

    def update() -> Tensor:
        with autocast(loop.precision, device):
            loss, _ = system.loss(batch, Draw.training(0, next(steps), places, len(places), device))
        (loss * scaler.scale).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = get_total_norm(gradients, foreach=True)
        torch._foreach_mul_(gradients, 1.0 / scaler.scale)
        optimizer.step()
        ema.update()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach().float(), norm.float()])

    return update


def _system(recipe: Recipe, device: torch.device, channels_last: bool) -> System:
    """Fresh weights, made on the device; texts are tokens that need no tokenizer."""
    with device:
        system = recipe.system.build()
    system.to(device).mode(training=True)
    text = getattr(system, "text", None)
    if text is not None:
        length = recipe.system.conditions[0].max_length  # type: ignore[attr-defined]
        text.tokens = lambda captions: torch.ones(len(captions), length, dtype=torch.int64, device=device)
    if channels_last:
        for p in learnt(system.trained).values():
            layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(p.dim())
            if layout is not None:
                p.data = p.data.to(memory_format=layout)
    prepare_blocks(system, recipe.loop)
    choose_attention(system.trained, recipe.system.attention, device, DTYPES[recipe.loop.precision])
    return system


def _syncs(update: Callable[[], Tensor]) -> int:
    """Times that an update waits for the device before its last fetch."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            values = update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        values.tolist()
    return sum("synchroniz" in str(each.message) for each in said)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def _machine(device: torch.device) -> str:
    """Device, date and versions in one line."""
    return f"{_name(device)}, {date.today().isoformat()}; {', '.join(_versions())}."


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    for name in ("diffusers", "transformers", "triton", "xformers"):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no {name}"


def write(path: Path, text: str) -> None:
    """Put the text between the marks of a page. Ends with a line where the page has none."""
    page = path.read_text() if path.is_file() else ""
    if BEGIN not in page or END not in page.partition(BEGIN)[2]:
        raise SystemExit(f"{path}: there is no {BEGIN} … {END} in it to write the table between")
    before, _, rest = page.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
