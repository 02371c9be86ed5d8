"""Short real runs for the tests: the tiny twins, cut to a few updates on a small sky."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from core.journal import FILE_NAME, read
from core.slots import Launch, Recipe
from core.train import Result, train
from data.slots import Base64Parts, CaptionedVideos
from registry import get, names

REPO = Path(__file__).parents[2]
SHORT = (
    "--max-steps 6 --global-batch 4 --batch-size 2 --loop.log-every 1 --num-workers 0 "
    "--validation.every 0 --validation.sample-every 0 --validation.batch-size 2 --validation.num-batches 2 "
    "--validation.num-samples 2 --validation.metric-clips 0 --validation.sampler.num-inference-steps 2 --checkpoint.every 0 "
    "--loop.mfu False"
)
BESIDE = {CaptionedVideos: "clouds", Base64Parts: "pictures"}
"""Folders beside the fixture `sky`, by what reads them."""
TWINS = tuple(name for name in names() if name.endswith("-tiny"))
"""Every twin there is: what holds for one is tested for all, and for those to come."""


def flags(name: str, sky: Path, more: str = "") -> list[str]:
    """The words after `run` for a short run; later flags win over those of SHORT. The data are those of the fixture
    `sky`, or what lies beside them.
    """
    words: dict[str, str] = {}
    root = sky.parent / BESIDE.get(type(get(name).data), sky.name)
    pairs = f"{SHORT} --data-root {root} {more}".split()
    for flag, value in zip(pairs[::2], pairs[1::2], strict=True):
        words[flag] = value
    return [name, *(word for pair in words.items() for word in pair)]


def short(name: str, sky: Path, more: str = "") -> Recipe:
    """The recipe of a short run."""
    head, *words = flags(name, sky, more)
    return get(head, *words)


def run_here(recipe: Recipe, out: Path, store: str, **launch) -> Result:
    """Train in this process, on the CPU."""
    return train(recipe, Launch(output_dir=out, store=store, device="cpu", **launch))


def registry(
    *words: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240, nproc: int = 0
) -> subprocess.CompletedProcess:
    """`python -m registry …` as a person runs it; with `nproc`, under torchrun."""
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        if nproc
        else [sys.executable]
    )
    variables = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(
        [*launcher, "-m", "registry", *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )


def journal(out: Path) -> list[dict]:
    """The metrics of a run, by line, without those of the machine."""
    lines = (event for event, _ in read(out / FILE_NAME) if event["event"] == "metrics")
    return [
        {"step": e["step"], "time": e["time"]} | e["values"]
        for e in lines
        if not any("system/" in k for k in e["values"])
    ]


def losses(out: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in journal(out) if "loss" in line}


def awake(folder: Path) -> Path:
    """An export of LDM with a text that shows: after few updates the layers behind cross-attention are next to zero."""
    scales = {"attn2.to_": 8.0, "proj_out.": 1.0, "conv_out.": 1.0, "embed_tokens.": 8.0}
    noise = torch.Generator().manual_seed(0)
    for path in (folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "bert" / "model.safetensors"):
        state = load_file(path)
        for name, tensor in state.items():
            scale = next((scale for part, scale in scales.items() if part in name and tensor.dim() > 1), None)
            if scale is not None:
                state[name] = scale * torch.randn(tensor.shape, generator=noise) / tensor[0].numel() ** 0.5
        save_file(state, path, metadata={"format": "pt"})
    return folder
