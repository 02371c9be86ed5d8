"""A network that checkpoints hold, as a table entry: how it is recognised, renamed and built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.weights.lazy import State

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by name. Those of Paddle's matrices are the other way round, so sizes are taken from what is alike in both."""


def as_they_are(state: State) -> dict[str, Any]:
    """Names that need no change."""
    return dict(state)


@dataclass(frozen=True)
class Network:
    """One kind of network. Every system adds its own to `core/weights/networks.py`."""

    name: str
    component: str
    """Its folder in a pipeline: unet, vae, text_encoder."""
    marks: tuple[str, ...]
    """Regular expressions; each is found at the start of some tensor's name."""
    rename: Callable[[State], dict[str, Any]] = as_they_are
    """Tensors under the names of the module here. Entries are renamed or dropped, never changed."""
    settings: Callable[[Shapes], dict[str, Any]] | None = None
    """Arguments of the constructor, as far as shapes tell them. None: it is only recognised, not imported."""
    kind: Callable[[], type[nn.Module]] | None = None
    """The module's class, imported on demand."""
    instead: str = ""
    """Where it is not imported: what to do."""
    takes: str = ""
    """Of a network around another: what of it an import takes, as a regular expression at the start of names,"""
    becomes: str = ""
    """and the component that this is."""
    renamed_settings: tuple[tuple[str, str], ...] = ()
    """Other names that stored configs use for arguments of the constructor."""

    def arguments(self, state: State, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the constructor: what a stored config says, and for the rest what the (renamed) shapes tell."""
        assert self.settings and self.kind
        told = self.settings({name: entry.shape for name, entry in state.items()})
        stored = {new: config[old] for old, new in self.renamed_settings if old in config} | dict(config)
        known = inspect.signature(self.kind().__init__).parameters
        return told | {name: value for name, value in stored.items() if name in known and value is not None}
