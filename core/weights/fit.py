"""Holds tensors against a network: what is missing, left over or of another shape, and all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from core.distributed import put
from core.errors import UserError
from core.weights.lazy import Lazy, State
from core.weights.motion import placed
from core.weights.names import some
from core.weights.paddle import in_torch_layout, matrices


class Misfit(NamedTuple):
    """Names of tensors that do not go together."""

    missing: list[str]
    """The network has them, the weights do not."""
    unused: list[str]
    """The reverse."""
    misshapen: list[str]

    def __str__(self) -> str:
        return "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in self._asdict().items() if names)


def misfit(module: nn.Module, state: Mapping[str, Tensor | Lazy]) -> Misfit:
    """Compare names and shapes. Nothing is read."""
    own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    return Misfit(
        [name for name in own if name not in state],
        [name for name in state if name not in own],
        [
            f"{name} {tuple(state[name].shape)} for {shape}"
            for name, shape in own.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    )


def refuse_misfit(module: nn.Module, state: Mapping[str, Tensor | Lazy]) -> None:
    """Raise UserError where the tensors are not exactly those of the module."""
    wrong = misfit(module, state)
    if any(wrong):
        raise UserError(
            f"these weights are not {type(module).__name__}'s ({len(module.state_dict())} tensors): {wrong}"
        )


def in_layout_of(module: nn.Module, state: State, paddle: bool = False) -> dict[str, Lazy]:
    """Tensors under the module's names in the layout of its layers: matrices of Paddle transposed, kernels of 1 x 1
    convolutions as matrices (or the reverse), tables of positions in its length. What the module says it has no use for
    (as diffusers and transformers let it) is left out.
    """
    own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    useless = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []
    kept = {n: e for n, e in state.items() if n in own or not any(re.match(pattern, n) for pattern in useless)}
    named = in_torch_layout(kept, matrices(module)) if paddle else kept
    return {name: _as_own(name, entry, own.get(name, entry.shape)) for name, entry in named.items()}


def _as_own(name: str, entry: Lazy, shape: tuple[int, ...]) -> Lazy:
    return _as_matrix(placed(name, entry, shape), shape)


def _as_matrix(entry: Lazy, shape: tuple[int, ...]) -> Lazy:
    """(out, in, 1, 1) and (out, in) are the same layer."""
    if entry.shape != shape and entry.shape[:2] == shape[:2] and {*entry.shape[2:], *shape[2:]} == {1}:
        return entry.reshaped(*shape)
    return entry


def load_strict(module: nn.Module, state: Mapping[str, Tensor | Lazy]) -> None:
    """Copies the state into the module, tensor by tensor, or raises UserError that names what is missing, unused or of
    another shape. On the meta device the tensors take the place of the module's own.
    """
    refuse_misfit(module, state)
    absent: dict[str, Tensor] = {}
    for name, own in module.state_dict().items():
        entry = state[name]
        tensor = entry.read() if isinstance(entry, Lazy) else entry
        if own.is_meta:
            absent[name] = tensor.to(own.dtype)
        else:
            put(own, tensor)
    if absent:
        module.load_state_dict(absent, strict=False, assign=True)
