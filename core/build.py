"""From a recipe to the real thing: data, modules on the device, optimizer, average, and where to go on from."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.attention import choose_attention
from core.blocks import prepare_blocks
from core.caches.opened import Opened, open_cache
from core.deferred import recording
from core.distributed import Ranks, spread
from core.ema import EMA
from core.errors import UserError
from core.fingerprint import Prints, held_against, prints
from core.fresh import Fresh
from core.models.partly import kept, learnt
from core.outputs import Start, start
from core.positions import Plan, plan_of
from core.precision import DTYPES, Scaler
from core.preflight import frozen_parts
from core.slots import Autoencoder, Launch, Optim, Recipe
from core.systems import System
from core.weights.load import load_component
from core.weights.start import load_learnt, load_start, start_names


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
    frozen: Prints
    """What the frozen parts are, for checkpoints."""
    plan: Plan
    """Which samples make which update."""
    total_steps: int
    start: Start
    cached: bool = False
    """Whether data and held-out data come from a cache, and the frozen parts are on the meta device."""


def build(recipe: Recipe, launch: Launch, here: Ranks) -> Built:
    """Build a recipe on this rank's device. Raises UserError for anything that cannot work, before MLflow is opened."""
    check_batch(recipe, here.data_world)
    recipe.optim.ready(here.world)
    dataset, held_out = recipe.data.build(), recipe.validation_data.build()
    _same_data(dataset, held_out, here)
    cache = open_cache(launch.cache, recipe, dataset, held_out) if launch.cache else None
    begin = _start(recipe, launch, here)
    if cache is not None:
        dataset, held_out = cache.training, cache.held_out
        begin = dataclasses.replace(begin, notes=(*begin.notes, cache.note))
    plan = plan_of(dataset, recipe.loop, here.data_world, _memory(here.device))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.loop.tf32
    system = _assemble(recipe, launch, here, begin, cache)
    frozen = prints(recipe, system, known=cache.frozen if cache else None)
    held_against(begin.checkpoint, frozen, launch.allow, here)
    groups = parameter_groups(system.trained, recipe.optim)
    return Built(
        system=system,
        dataset=dataset,
        held_out=held_out,
        optimizer=recipe.optim.build(groups, fused=_can_fuse(here)),
        parameters=list(learnt(system.trained).values()),
        ema=EMA(recipe.optim.ema, system.trained) if recipe.optim.ema else None,
        scaler=Scaler(recipe.loop.precision),
        frozen=frozen,
        plan=plan,
        total_steps=recipe.loop.max_steps or plan.steps(recipe.loop.epochs or 0.0),
        start=begin,
        cached=cache is not None,
    )


def _assemble(recipe: Recipe, launch: Launch, here: Ranks, begin: Start, cache: Opened | None) -> System:
    """The system on this rank's device: built on the meta device, spread, then filled tensor by tensor, so that no rank
    holds the whole of what it keeps a part of, and nothing is drawn that a checkpoint brings.
    """
    with recording() as tape:
        system = recipe.system.build()
    fresh = Fresh(tape, system.trained, system.frozen)
    _refuse_impossible(recipe, system, here)
    if cache is None:
        _fill_frozen(recipe, system, fresh, here.device)
    else:
        cache.give_constants(system)
    system.mode(training=True)
    prepare_blocks(system, recipe.loop)
    spread(system, recipe.parallel, here)
    home = torch.device("cpu") if here.mesh is not None and recipe.parallel.offload else here.device
    brought = start_names(recipe, system.trained)
    if begin.checkpoint:
        brought |= {f"{name}.{key}" for name, module in system.trained.items() for key in kept(module)}
    fresh.fill(system.trained, recipe.loop.seed, home, skip=brought)
    load_start(recipe, system.trained, frozen_alone=begin.checkpoint is not None)
    if launch.init_from and begin.checkpoint is None:
        for name, module in system.trained.items():
            load_learnt(module, launch.init_from, name)
    attend(system, recipe, here)
    return system


def _fill_frozen(recipe: Recipe, system: System, fresh: Fresh, device: torch.device) -> None:
    fresh.fill(system.frozen, recipe.loop.seed, device, skip=dict(system.frozen.named_parameters()))
    load_frozen(recipe, system)


def frozen_networks(recipe: Recipe, device: torch.device) -> System:
    """A system of which the frozen networks are there, and the trained ones stay on the meta device."""
    with recording() as tape:
        system = recipe.system.build()
    _fill_frozen(recipe, system, Fresh(tape, system.trained, system.frozen), device)
    system.mode(training=False)
    return system


@contextmanager
def frozen_at_hand(recipe: Recipe, built: Built, here: Ranks) -> Iterator[None]:
    """Inside, the frozen networks are there. Those of a run from a cache are loaded for it and let go afterwards; where
    it makes no samples, there are none.
    """
    if not built.cached:
        yield
        return
    system, away = built.system, built.system.frozen
    loaded = frozen_networks(recipe, here.device).frozen if recipe.validation.generates else nn.ModuleDict()
    system.frozen = loaded
    try:
        yield
    finally:
        system.frozen = away


def _refuse_impossible(recipe: Recipe, system: System, here: Ranks) -> None:
    """Raise UserError for a system that cannot be trained on these ranks in these batches."""
    if recipe.parallel.sequence > 1 and not system.splits_sequence:
        raise UserError(
            f"parallel.sequence: {recipe.name} cannot split the tokens of a sample over ranks; take "
            "--parallel.sequence 1, and --parallel.shard for what does not fit one rank"
        )
    if not system.additive and recipe.loop.global_batch != recipe.loop.micro_batch * here.data_world:
        raise UserError(
            f"loop.micro_batch: the loss of {type(recipe.system).__name__} is over the whole batch and cannot be "
            f"accumulated: global_batch must be micro_batch x ranks = {recipe.loop.micro_batch * here.data_world}"
        )


def _same_data(dataset: Any, held_out: Any, here: Ranks) -> None:
    """Raise UserError where ranks have other samples: each would train on its own part of another order."""
    wrong = other_data(here.everyone([(len(found), found.fingerprint) for found in (dataset, held_out)]))
    if wrong:
        raise UserError(wrong)


def other_data(counts: Sequence[Sequence[tuple[int, str]]]) -> str | None:
    """What is wrong with the ranks' numbers of samples and fingerprints (for training, held out); None: nothing."""
    odd = next((rank for rank, count in enumerate(counts) if count != counts[0]), None)
    if odd is None:
        return None
    (trains, _), (holds, _) = counts[odd]
    (first_trains, _), (first_holds, _) = counts[0]
    return (
        f"rank {odd} has other data than rank 0: {trains:,} and {first_trains:,} samples for training, {holds:,} and "
        f"{first_holds:,} held out. Is the folder the same on all machines?"
    )


def check_batch(recipe: Recipe, world: int) -> None:
    """Raise UserError unless global_batch is a whole number of micro-batches on every rank, naming what would fit. Data
    of many shapes have updates of their own.
    """
    loop = recipe.loop
    if recipe.data.many_shapes:
        return
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


def _start(recipe: Recipe, launch: Launch, here: Ranks) -> Start:
    """Where the run writes and starts from. Rank 0 decides and prepares; its error reaches all."""
    box: Start | UserError | None = None
    if here.first:
        try:
            box = start(recipe, launch)
        except UserError as error:
            box = error
    box = here.agree(box)
    if isinstance(box, UserError):
        raise box
    assert box is not None
    return box


def place(system: System, recipe: Recipe, here: Ranks) -> None:
    """Move a system to the device and choose its attention there."""
    system.to(here.device)
    attend(system, recipe, here)


def attend(system: System, recipe: Recipe, here: Ranks) -> None:
    """Choose a system's attention on its device; rank 0 says when it is not the one asked for."""
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
    for name, parameter in learnt(trained).items():
        match = (group for group in groups if re.search(str(group["name"]), name))
        next(match, default)["params"].append(parameter)  # type: ignore[attr-defined]
    for group in groups:
        if not group["params"]:
            raise UserError(f"optim.groups: pattern {group['name']!r} matches no trained parameter")
    return [group for group in (default, *groups) if group["params"]]


def _can_fuse(here: Ranks) -> bool:
    """The fused kernels know no DTensor on the CPU."""
    return here.mesh is None or here.device.type == "cuda"


def _memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
