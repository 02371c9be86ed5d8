"""`sample`: new clips from a run's newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from core import checkpoint
from core.build import load_frozen, place
from core.distributed import Ranks, choose_device
from core.errors import UserError
from core.media import enlarged, sheet, tiled, to_uint8, write_gif, write_mp4
from core.outputs import checkpoint_of, find_run
from core.preflight import writable
from core.recipe_file import read
from core.systems import System
from core.validate import generate


def sample(
    where: str,
    *,
    prompt: Sequence[str] = (),
    num: int = 4,
    seed: int = 0,
    steps: int | None = None,
    output_dir: Path | None = None,
    raw: bool = False,
    device: str = "auto",
    store: str | None = None,
) -> Path:
    """Sample `num` clips from the run at `where` (output directory or run id); returns the folder they are in.

    They are of the texts `prompt` in turn; without any, of those of the recipe's validation, else of the empty text.
    The averaged weights are used where the run has them, unless `raw`. The same seed gives the same clips.
    """
    folder = find_run(where, store)
    recipe = read(folder)
    if prompt and not recipe.told:
        raise UserError(f"--prompt: {recipe.name} is told no text")
    prompts = list(prompt or recipe.validation.prompts) or [""]
    found = checkpoint_of(folder)
    out = output_dir or folder / "samples" / f"{found.name}-seed-{seed}"
    writable(out)
    here = Ranks(choose_device(device), 0, 1, None)
    system = recipe.system.build()
    load_frozen(recipe, system)
    averaged = load_trained(system, found, here, averaged=recipe.optim.ema is not None and not raw)
    place(system, recipe, here)
    system.mode(training=False)
    sampler = recipe.validation.sampler if steps is None else recipe.validation.sampler.but(num_inference_steps=steps)
    clips = generate(system, recipe, sampler, num, here, seed, prompts=prompts)
    if clips is None:
        raise UserError(f"{recipe.name} is no generative recipe: it makes no samples")
    frames = to_uint8(clips)
    fps = recipe.validation.fps
    for i, clip in enumerate(frames):
        write_mp4(out / f"clip-{i:03d}.mp4", enlarged(clip), fps)
    write_gif(out / "grid.gif", enlarged(tiled(frames)), fps)
    sheet(frames).save(out / "sheet.png")
    made = {
        "checkpoint": str(found),
        "seed": seed,
        "steps": sampler.num_inference_steps,
        "averaged": averaged,
        "clips": num,
        "prompts": [prompts[i % len(prompts)] for i in range(num)],
        "guidance_scale": sampler.guidance_scale,
    }
    (out / "samples.json").write_text(json.dumps(made, indent=1))
    return out


def load_trained(system: System, found: Path, here: Ranks, averaged: bool) -> bool:
    """Fill the trained networks from a checkpoint, averaged or raw. Returns which."""
    weights = {f"weights.{name}": t.detach() for name, t in system.trained.state_dict().items()}
    checkpoint.load(found, weights, here)
    if averaged:
        checkpoint.load(found, {f"ema.{name}": p.detach() for name, p in system.trained.named_parameters()}, here)
    return averaged
