"""`weights` of motion modules and LoRAs: merge one into the other, and the layouts of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.weights.adapters import (
    Adapter,
    merged,
    open_adapter,
    taken_from,
    write_adapter,
    write_layout,
)
from core.weights.folder import whole_folder
from core.weights.load import locate
from core.weights.lora import LORA_NAME, Lora, lora_at, needs_merging, read_lora, refuse_unfit, write_lora
from core.weights.names import some


def merge(adapter: str, lora: str, *, to: Path | None, replace_if_exists: bool, alpha: float | None) -> int:
    """Fold a LoRA into motion modules, and write them as a MotionAdapter folder, whole or not at all."""
    if to is None:
        raise UserError("weights merge: --to DIR says where the folder goes")
    modules, layers = open_adapter(locate(adapter, "motion_adapter")), read_lora(locate(lora, ""), alpha)
    together = merged(modules, layers)
    with whole_folder(to, replace_if_exists) as partial:
        write_adapter(together, partial)
    print(f"{to}: {len(together.state)} tensors, {len(layers.layers)} with the LoRA folded in ({_told(layers)})")
    return 0


def import_lora(path: Path, to: Path, alpha: float | None, unet: Any = None) -> int:
    """Write a LoRA in any layout as the file that stock pipelines open, `to`/lora; held against `unet`, if given."""
    lora = read_lora(path, alpha)
    if unet is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        refuse_unfit(lora, shapes, type(unet).__name__)
    with whole_folder(to / "lora") as partial:
        write_lora(lora, partial)
    print(f"lora: {len(lora.tensors)} tensors, {lora.layout}, in {to / 'lora' / LORA_NAME} ({_told(lora)})")
    if unmerged := needs_merging(lora):
        print(
            f"  stock pipelines cannot call {len(unmerged)} of its layers ({some(unmerged)}): "
            "`weights merge` folds it in"
        )
    return 0


def _told(lora: Lora) -> str:
    scales = sorted({lora.scale(layer) for layer in lora.layers})
    ranks = sorted({lora.rank(layer) for layer in lora.layers})
    return f"rank {', '.join(map(str, ranks))}, scale {', '.join(f'{s:g}' for s in scales)}, alpha from {lora.told}"


def motion_of(networks: Mapping[str, Any], layout: str) -> tuple[Adapter, Lora | None]:
    """The motion modules of a system's UNet, and the LoRA in it. Raises UserError where it has none."""
    unet = networks.get("unet")
    if not hasattr(unet, "save_motion_modules"):
        raise UserError(f"--layout {layout}: this run has no UNet with motion modules")
    return taken_from(unet)


def export_files(path: Path, to: Path, layout: str, alpha: float | None) -> int:
    """Motion modules or a LoRA of others in another layout."""
    lora = read_lora(path, alpha) if lora_at(path) else None
    adapter = open_adapter(path) if lora is None else None
    return print_layout(layout, to, adapter, lora)


def print_layout(layout: str, to: Path, adapter: Adapter | None, lora: Lora | None) -> int:
    """Write a layout, and say where."""
    path = write_layout(layout, to, adapter, lora)
    print(f"{path}: layout {layout}{f', {_told(lora)}' if lora else ''}")
    return 0
