"""Store an exported network in fp16: half the size, for weights that ship with the project.

python -m core.weights.half runs/vae/export/vae core/weights/shipped/lvdm-video-vae-tiny
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from core.weights.folder import NAME, write_weights


def halve(source: Path, target: Path) -> int:
    """Copy the diffusers folder `source` to `target` with its floating tensors in fp16. Returns the bytes of the
    weights.
    """
    target.mkdir(parents=True, exist_ok=True)
    state = {k: t.half() if t.is_floating_point() else t for k, t in load_file(source / NAME).items()}
    worst = max((t.abs().max().item() for t in state.values()), default=0.0)
    if not worst < torch.finfo(torch.float16).max:
        raise SystemExit(f"{source}: a weight of {worst} does not fit fp16")
    written = write_weights(target, state)
    shutil.copy(source / "config.json", target / "config.json")
    return written.stat().st_size


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m core.weights.half EXPORTED_FOLDER TARGET_FOLDER")
    print(f"{halve(Path(sys.argv[1]), Path(sys.argv[2])):,} bytes")
