"""From a recipe to the real thing: data, modules on the device, optimizer, average, and where to go on from."""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from core.attention import choose_attention
from core.distributed import Ranks, spread
from core.ema import EMA
from core.errors import UserError
from core.outputs import checkpoint_of, default_run_name, find_run, output_dir, prepare, refuse_other_recipe
from core.precision import DTYPES, Scaler
from core.preflight import frozen_parts
from core.recipe_file import dump, load
from core.slots import Autoencoder, Launch, Optim, Recipe
from core.systems import System
from core.weights.load import load_component


@dataclass
class Built:
    """Everything that the loop works with."""

    system: System
    dataset: Any
    held_out: Any
    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    ema: EMA | None
    scaler: Scaler
    total_steps: int
    folder: Path
    run_name: str
    checkpoint: Path | None


def build(recipe: Recipe, launch: Launch, here: Ranks) -> Built:
    """Build a recipe on this rank's device. Raises UserError for anything that cannot work, before MLflow is opened."""
    check_batch(recipe, here.world)
    dataset, held_out = recipe.data.build(), recipe.validation_data.build()
    folder, run_name, found = _folder(recipe, launch, here)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.loop.tf32
    torch.manual_seed(recipe.loop.seed)
    system = recipe.system.build()
    if not system.additive and recipe.loop.global_batch != recipe.loop.micro_batch * here.world:
        raise UserError(
            f"loop.micro_batch: the loss of {type(recipe.system).__name__} is over the whole batch and cannot be "
            f"accumulated: global_batch must be micro_batch x ranks = {recipe.loop.micro_batch * here.world}"
        )
    load_frozen(recipe, system)
    if launch.init_from:
        for name, module in system.trained.items():
            load_component(module, launch.init_from, name)
    place(system, recipe, here)
    system.mode(training=True)
    prepare_blocks(system, recipe.loop.activation_checkpointing, recipe.loop.compile)
    spread(system, here.mesh)
    groups = parameter_groups(system.trained, recipe.optim)
    return Built(
        system=system,
        dataset=dataset,
        held_out=held_out,
        optimizer=recipe.optim.build(groups, fused=_can_fuse(here)),
        parameters=list(system.trained.parameters()),
        ema=EMA(recipe.optim.ema, system.trained) if recipe.optim.ema else None,
        scaler=Scaler(recipe.loop.precision),
        total_steps=total_steps(recipe, len(dataset)),
        folder=folder,
        run_name=run_name,
        checkpoint=found,
    )


def check_batch(recipe: Recipe, world: int) -> None:
    """Raise UserError unless global_batch is a whole number of micro-batches on every rank, naming what would fit."""
    loop = recipe.loop
    if loop.global_batch % (loop.micro_batch * world):
        fits = [m for m in range(1, loop.global_batch + 1) if loop.global_batch % (m * world) == 0]
        advice = (
            f"--batch-size {' or '.join(map(str, fits))} fits"
            if fits
            else f"take a --global-batch that is a multiple of {world}"
        )
        raise UserError(
            f"loop.global_batch = {loop.global_batch} does not divide over {world} ranks x micro_batch "
            f"{loop.micro_batch}: {advice}"
        )


def _folder(recipe: Recipe, launch: Launch, here: Ranks) -> tuple[Path, str, Path | None]:
    """Output directory, run name, and the checkpoint to resume from. Rank 0 decides and prepares; its error reaches
    all.
    """
    box: tuple[Path, str, Path | None] | UserError | None = None
    if here.first:
        try:
            box = _decide(recipe, launch)
        except UserError as error:
            box = error
    box = here.agree(box)
    if isinstance(box, UserError):
        raise box
    assert box is not None
    return box


def _decide(recipe: Recipe, launch: Launch) -> tuple[Path, str, Path | None]:
    if launch.resume:
        folder = find_run(launch.resume, launch.store)
        refuse_other_recipe(recipe, load((folder / "recipe.json").read_text(), str(folder / "recipe.json")), folder)
        found = checkpoint_of(folder)
        (folder / "recipe.json").write_text(dump(recipe))
        return folder, launch.run_name or folder.name, found
    run_name = launch.run_name or default_run_name()
    folder = output_dir(recipe, launch, run_name)
    prepare(folder, launch.overwrite)
    (folder / "recipe.json").write_text(dump(recipe))
    return folder, run_name, None


def place(system: System, recipe: Recipe, here: Ranks) -> None:
    """Move a system to the device and choose its attention there; rank 0 says when it is not the one asked for."""
    system.to(here.device)
    with warnings.catch_warnings():
        if not here.first:
            warnings.simplefilter("ignore")
        choose_attention(system.trained, recipe.system.attention, here.device, DTYPES[recipe.loop.precision])


def load_frozen(recipe: Recipe, system: System) -> None:
    """Load the weights of every frozen part, with the latents' constants stored beside them unless the recipe gives its
    own.
    """
    for path, slot in frozen_parts(recipe):
        if slot.weights is None:
            raise UserError(f"{path}.weights is not set: this part is frozen and needs trained weights")
        module = system.frozen[slot.component]
        if not isinstance(slot, Autoencoder):  # it knows what it needs besides tensors
            module.load(slot.weights)  # type: ignore[operator]
            continue
        config = load_component(module, slot.weights, slot.component)
        if slot.scale_factor is None:
            constants = module.constants_of(config)  # type: ignore[operator]
            if not config or constants is None:
                raise UserError(
                    f"{path}.scale_factor: the weights carry no latent constants; `measure-latents` prints them"
                )
            module.register_to_config(**module.constants_config(*constants))  # type: ignore[operator]


def prepare_blocks(system: System, checkpointing: bool, compiled: bool) -> None:
    """Activation checkpointing, then compilation, block by block. Parameter names do not change."""
    for block in system.blocks() if checkpointing or compiled else []:
        if checkpointing:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compiled:
            block.compile()


def parameter_groups(trained: nn.ModuleDict, optim: Optim) -> list[dict[str, Any]]:
    """Optimizer groups: the first pattern that matches a parameter's name wins; the rest are the group `default`.

    Raises UserError for a pattern that matches nothing.
    """
    default = {"name": "default", "params": [], "lr_scale": 1.0}
    groups = [
        {"name": g.pattern, "params": [], "lr_scale": g.lr_scale}
        | ({} if g.weight_decay is None else {"weight_decay": g.weight_decay})
        for g in optim.groups
    ]
    for name, parameter in trained.named_parameters():
        match = (group for group in groups if re.search(str(group["name"]), name))
        next(match, default)["params"].append(parameter)  # type: ignore[attr-defined]
    for group in groups:
        if not group["params"]:
            raise UserError(f"optim.groups: pattern {group['name']!r} matches no trained parameter")
    return [group for group in (default, *groups) if group["params"]]


def _can_fuse(here: Ranks) -> bool:
    """The fused kernels know no DTensor on the CPU."""
    return here.mesh is None or here.device.type == "cuda"


def total_steps(recipe: Recipe, samples: int) -> int:
    """Updates of a run: max_steps, or epochs over `samples`, rounded up."""
    loop = recipe.loop
    if loop.max_steps is not None:
        return loop.max_steps
    assert loop.epochs is not None
    return max(1, -(-int(loop.epochs * samples) // loop.global_batch))
