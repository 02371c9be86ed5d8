"""What a run will be, before it has weights, data or a GPU: built on the meta device, counted, printed as a table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.blocks import OPERATORS, checkpoint_blocks, checkpointed
from core.build import parameter_groups
from core.draw import Draw
from core.flops import Attention, count, shapes_for
from core.models.partly import learnt, unlearnt
from core.precision import autocast
from core.slots import Recipe
from core.systems import System

GIB = 2**30


@dataclass(frozen=True)
class ModuleRow:
    """One module of the plan."""

    name: str
    kind: str
    parameters: int
    tensors: int
    trained: bool


@dataclass(frozen=True)
class Plan:
    """Sizes of a run on one rank without sharding. Memory in bytes."""

    modules: list[ModuleRow]
    memory: dict[str, int]
    steps: str
    batch: str


def plan(recipe: Recipe) -> Plan:
    """Build `recipe` on the meta device and count: parameters, and memory of one rank with `micro_batch` samples."""
    with torch.device("meta"):
        system = recipe.system.build()
    rows = [_row(name, module, learnt(module), True) for name, module in system.trained.items()]
    rest = {name: (module, unlearnt(module)) for name, module in system.trained.items()}
    rows += [_row(f"{name}, rest", module, tensors, False) for name, (module, tensors) in rest.items() if tensors]
    rows += [_row(name, module, dict(module.named_parameters()), False) for name, module in system.frozen.items()]
    return Plan(modules=rows, memory=_memory(recipe, system), steps=_steps(recipe), batch=_batch(recipe))


def _row(name: str, module: nn.Module, tensors: Mapping[str, Tensor], trained: bool) -> ModuleRow:
    return ModuleRow(name, type(module).__name__, sum(p.numel() for p in tensors.values()), len(tensors), trained)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _memory(recipe: Recipe, system: System) -> dict[str, int]:
    frozen = [*unlearnt(system.trained).values(), *system.frozen.parameters()]
    weights = _bytes(list(learnt(system.trained).values()))
    parts = {"weights, trained": weights, "weights, frozen": _bytes(frozen), "gradients": weights}
    parts["optimizer"] = _optimizer_bytes(recipe, system)
    if recipe.optim.ema:
        parts["average"] = weights
    again = largest_block(recipe, system) if recipe.loop.activation_checkpointing else 0
    parts["activations"] = activation_bytes(recipe, system)
    if again:
        parts["made again, one block"] = again
    return parts


def _optimizer_bytes(recipe: Recipe, system: System) -> int:
    """Counted on the optimizer's own state after one update on the meta device."""
    optimizer = recipe.optim.build(parameter_groups(system.trained, recipe.optim), fused=False)
    for p in learnt(system.trained).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    optimizer.zero_grad(set_to_none=True)
    return _bytes(state)


def activation_bytes(recipe: Recipe, system: System) -> int:
    """What is kept for the backward pass of one micro-batch: every saved storage counted once, parameters left out."""
    counter = _Counter(system)
    with _Kept(recipe, system, counter) as kept, kept.attention:
        checkpoint_blocks(system, recipe.loop)
        return _saved(recipe, system, counter)


class _Kept(TorchDispatchMode):
    """Counts what checkpointed blocks keep of `loop.recompute_keep`: autograd does not hold it."""

    def __init__(self, recipe: Recipe, system: System, counter: _Counter) -> None:
        super().__init__()
        self._names, self._count, self._within = recipe.loop.recompute_keep, counter, False
        self._kept = [operator for name in self._names for operator in OPERATORS[name]]
        self.attention = Attention(self._attended)
        for block in checkpointed(system, recipe.loop) if self._names else ():
            block.register_forward_pre_hook(lambda *_: self._enter(True))
            block.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, within: bool) -> None:
        self._within = within

    def _attended(self, out: Tensor) -> None:
        if self._within and "attention" in self._names:
            self._count(out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._within and not self.attention.inside and func in self._kept:
            self._count(out)
        return out


def largest_block(recipe: Recipe, system: System) -> int:
    """What the block that keeps most keeps for its backward pass. Checkpointing makes it again, one block at a time."""
    blocks: list[int] = []

    def before(block: nn.Module, _: Any) -> None:
        blocks.append(-counter.total)

    def after(block: nn.Module, *_: Any) -> None:
        blocks[-1] += counter.total

    counter = _Counter(system)
    handles = [
        h
        for b in checkpointed(system, recipe.loop)
        for h in (b.register_forward_pre_hook(before), b.register_forward_hook(after))
    ]
    _saved(recipe, system, counter)
    for handle in handles:
        handle.remove()
    return max(blocks)


class _Counter:
    """Counts the storages that autograd saves, each once, without those of parameters."""

    def __init__(self, system: System) -> None:
        self.total = 0
        self._seen = {p.untyped_storage()._cdata for p in system.trained.parameters()}
        self._kept: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)  # keeps the address from being used again
            self.total += storage.nbytes()
        return tensor


def _saved(recipe: Recipe, system: System, counter: _Counter) -> int:
    micro = recipe.loop.micro_batch
    places = list(range(micro))
    video = torch.empty(micro, 3, *recipe.data.clip_shape(), device="meta")
    batch = {"pixel_values": video, "caption": [""] * micro, "id": [""] * micro, "place": places}
    draw = Draw.training(0, 0, places, recipe.loop.global_batch, "meta")
    with (
        warnings.catch_warnings(),
        torch.autograd.graph.saved_tensors_hooks(counter, lambda t: t),
        autocast(recipe.loop.precision, torch.device("meta")),
    ):
        # what operators keep under checkpointing is not for these hooks: it is counted beside them
        warnings.filterwarnings("ignore", message="A saved_tensors_hooks context")
        system.loss(batch, draw)
    return counter.total


def _steps(recipe: Recipe) -> str:
    loop = recipe.loop
    return f"{loop.max_steps:,} updates" if loop.max_steps else f"{loop.epochs:g} epochs (updates follow from the data)"


def _batch(recipe: Recipe) -> str:
    loop = recipe.loop
    accumulation = loop.global_batch // loop.micro_batch
    return f"{loop.global_batch} samples an update = {accumulation} micro-batches of {loop.micro_batch} on one rank"


def render(recipe: Recipe, planned: Plan) -> str:
    """The plan as plain text."""
    lines = [f"{recipe.name}: {planned.steps}, {planned.batch}", ""]
    lines += [f"{'module':<14}{'class':<22}{'parameters':>16}{'tensors':>9}  "]
    for row in planned.modules:
        lines.append(
            f"{row.name:<14}{row.kind:<22}{row.parameters:>16,}{row.tensors:>9}  "
            f"{'trained' if row.trained else 'frozen'}"
        )
    lines += ["", f"{'memory of one rank':<34}{'GiB':>16}"]
    lines += [f"{name:<34}{size / GIB:>16.3f}" for name, size in planned.memory.items()]
    lines += [f"{'sum':<34}{sum(planned.memory.values()) / GIB:>16.3f}"]
    if recipe.loop.mfu:
        lines += ["", f"one micro-batch: {count(recipe, shapes_for(recipe))}"]
    return "\n".join(lines)
