"""Fresh values for a module that was built under `recording`: which name draws what, and how it is filled in."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from core.deferred import Region, Tape
from core.distributed import put
from core.errors import UserError, did_you_mean
from core.hashing import hash_of


class Fresh:
    """How each parameter, buffer and plain tensor attribute of some modules comes about, by name.

    Made before the modules are cast, sharded or otherwise changed outside of the recording. Each draw on the tape
    belongs to the first name that depends on it, and is seeded by (seed, that name, its place among the name's draws):
    a copy of a parameter gets the parameter's values, and nothing else matters.
    """

    def __init__(self, tape: Tape, *modules: nn.Module) -> None:
        self._tape = tape
        self._tensors: dict[str, Region | Tensor] = {}
        self._ties: dict[str, list[str]] = {}
        self._first: dict[str, str] = {}
        self._draws: dict[int, tuple[str, int]] = {}
        tied: dict[int, str] = {}
        for module in modules:
            for _, _, name, tensor in _slots(module, ""):
                if name in self._tensors:
                    raise UserError(f"two of the modules have a tensor named {name!r}")
                self._add(name, tensor, tied.setdefault(id(tensor), name))
        self._refuse_views([p for module in modules for p in module.parameters() if p.is_meta])

    def _add(self, name: str, tensor: Tensor, first: str) -> None:
        self._first[name] = first
        self._ties.setdefault(first, []).append(name)
        if not tensor.is_meta:
            self._tensors[name] = tensor.detach().clone()
            return
        region = self._tensors[name] = self._tape.region(tensor)
        draws = [i for i in self._tape.needed(region.storage) if self._tape.ops[i].random]
        for place, index in enumerate(draws):
            self._draws.setdefault(index, (name, place))

    def _refuse_views(self, parameters: list[nn.Parameter]) -> None:
        """Parameters that share memory, but are not one: each would get its own."""
        owner: dict[int, nn.Parameter] = {}
        for parameter in parameters:
            other = owner.setdefault(self._tape.region(parameter).storage, parameter)
            if other is not parameter:
                shapes = f"{tuple(other.shape)} and {tuple(parameter.shape)}"
                raise UserError(f"two parameters, {shapes}, are views of one memory; make them one, or copies")

    def value(self, name: str, seed: int) -> Tensor:
        """The fresh values of a tensor, on the CPU, in the dtype in which it was built. Peak memory: that tensor and
        what it is computed from.

        Raises UserError, naming tensor and operation, for what cannot be replayed.
        """
        region = self._known(name)
        if isinstance(region, Tensor):
            return region.clone()
        needed = self._tape.needed(region.storage)
        ops = [self._tape.ops[i] for i in needed]
        for op in ops:
            if op.trouble:
                raise UserError(f"{name} cannot be made: {op.name}: {op.trouble}")
        if all(op.unset for op in ops) and region.nbytes:
            raise UserError(f"{name} is left unset by its constructor ({ops[0].name}): it needs weights or an init")
        seeds = {i: hash_of(seed, *self._draws[i]) & 0xFFFFFFFF for i in needed if i in self._draws}
        return region.on(self._tape.play(needed, [region.storage], seeds)[region.storage])

    def _known(self, name: str) -> Region | Tensor:
        if name not in self._tensors:
            raise UserError(f"{name} was not there when the module was recorded{did_you_mean(name, self._tensors)}")
        return self._tensors[name]

    @torch.no_grad()
    def fill(
        self, module: nn.Module, seed: int, device: torch.device, *, skip: Container[str] = (), prefix: str = ""
    ) -> None:
        """Give every tensor of `module` its fresh values: on meta, or emptied by `to_empty`; whole, or sharded by
        `fully_shard`, where each rank keeps its part of one parameter at a time, without communication.

        Tensors named in `skip` become uninitialised memory. `prefix` is where `module` stands in what was recorded.
        Raises UserError for a tensor that cannot be made.
        """
        made: dict[str, Tensor] = {}
        for holder, key, name, old in _slots(module, prefix):
            self._known(name)
            first = self._first[name]
            if first not in made:
                left_out = any(tie in skip for tie in self._ties[first])
                made[first] = _blank(old, device) if left_out else self._made(name, old, seed, device)
            holder[key] = made[first]

    def _made(self, name: str, old: Tensor, seed: int, device: torch.device) -> Tensor:
        value = self.value(name, seed)
        if value.shape != old.shape:
            raise UserError(f"{name} is {tuple(old.shape)}, but was {tuple(value.shape)} when it was recorded")
        if old.is_meta and not isinstance(old, DTensor):
            return _like(value.to(device, old.dtype), old)
        return put(_blank(old, device), value)


def _slots(module: nn.Module, prefix: str) -> Iterator[tuple[dict[str, Any], str, str, Tensor]]:
    """Every tensor of a module: the dict that holds it, its key there, its full name. Tied ones come once a holder,
    shared submodules once; plain attributes only while they are on meta.
    """
    for path, part in module.named_modules(prefix=prefix.removesuffix(".")):
        start = f"{path}." if path else ""
        plain = {key: value for key, value in vars(part).items() if key not in ("_parameters", "_buffers", "_modules")}
        _refuse_nested(start, plain)
        found = [(holder, key) for holder in (part._parameters, part._buffers) for key in holder]
        found += [(vars(part), key) for key, value in plain.items() if isinstance(value, Tensor) and value.is_meta]
        for holder, key in found:
            if holder[key] is not None:
                yield holder, key, f"{start}{key}", holder[key]


def _refuse_nested(start: str, plain: dict[str, Any]) -> None:
    for key, value in plain.items():
        if isinstance(value, (list, tuple, dict)):
            for leaf in tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.is_meta and not isinstance(leaf, nn.Parameter):
                    raise UserError(f"{start}{key} holds tensors in a {type(value).__name__}: register them as buffers")


def _blank(old: Tensor, device: torch.device) -> Tensor:
    """Uninitialised memory in the place of a meta tensor; a tensor that has memory, as it is."""
    return _like(torch.empty_like(old, device=device), old) if old.is_meta else old


def _like(new: Tensor, old: Tensor) -> Tensor:
    """A parameter where the old one was, with what libraries have marked on it."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    if not isinstance(old, DTensor):
        vars(new).update(vars(old))
    return new
