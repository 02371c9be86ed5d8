"""`measure-latents`: shift and scale of an autoencoder's latents on a dataset, so that latents have mean 0 and
deviation 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from core.distributed import choose_device
from core.draw import Draw
from core.errors import UserError
from core.loader import batches, to_device
from core.slots import Recipe
from core.validate import fixed_keys
from core.weights.load import load_component, locate


def measure_latents(
    recipe: Recipe, *, clips: int = 256, weights: str | None = None, device: str = "auto", write: bool = False
) -> dict[str, float]:
    """`scale_factor` and `shift_factor` over `clips` training clips: shift = -mean, scale = 1 / deviation of posterior
    samples.

    `weights` overrides the recipe's (a run id or output directory of an autoencoder recipe, say). With `write` the
    constants are stored in the config.json beside the weights, where training finds them.
    """
    autoencoder = getattr(recipe.system, "autoencoder", None)
    spec = weights or (autoencoder.weights if autoencoder else None)
    if autoencoder is None or spec is None:
        raise UserError(f"{recipe.name}: no autoencoder weights to measure; give --weights")
    here = choose_device(device)
    vae = autoencoder.build()
    load_component(vae, spec, autoencoder.component)
    vae.to(here).eval()
    constants = _moments(vae, recipe, clips, here)
    if write:
        entries = vae.constants_config(constants["scale_factor"], constants["shift_factor"])  # type: ignore[operator]
        _write(locate(spec, autoencoder.component), entries)
    return constants


@torch.no_grad()
def _moments(vae: torch.nn.Module, recipe: Recipe, clips: int, here: torch.device) -> dict[str, float]:
    dataset = recipe.data.build()
    keys = fixed_keys(dataset, clips)
    count, total, squares = 0, 0.0, 0.0
    for batch in batches(dataset, [keys[i : i + 4] for i in range(0, len(keys), 4)], workers=0, pin=False):
        posterior = vae.encode(to_device(batch, here)["pixel_values"])  # type: ignore[operator]
        draw = Draw.fixed("measure", batch["id"], batch["place"], len(keys), here)
        z = posterior.sample(draw.noise(posterior.mean.shape[1:])).double()
        count, total, squares = count + z.numel(), total + z.sum().item(), squares + z.square().sum().item()
    mean = total / count
    return {"scale_factor": 1.0 / math.sqrt(squares / count - mean**2), "shift_factor": -mean}


def _write(path: Path, constants: dict[str, float]) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise UserError(
            f"{path} has no config.json to write the constants into: pass them as "
            "--system.autoencoder.scale-factor and --system.autoencoder.shift-factor"
        )
    config.write_text(json.dumps(json.loads(config.read_text()) | constants, indent=2) + "\n")
