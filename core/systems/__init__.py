"""The interface between the loop and what is trained. The loop knows nothing of video or text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core.draw import Draw
from core.slots import Sampler
from core.weights.folder import write_folder

Batch = dict[str, Any]
Logs = dict[str, Tensor]


class System:
    """What a recipe trains. Built with fresh weights on torch's current default device; `meta` works.

    `trained` is all that optimizer, clipping, EMA, checkpoint and export see, and of its parameters only those that
    require a gradient; `frozen` never gets one.
    """

    trained: nn.ModuleDict
    frozen: nn.ModuleDict
    additive: ClassVar[bool] = True
    """Whether the loss of a batch is the mean of the losses of its parts (False: no accumulation)."""
    splits_sequence: ClassVar[bool] = False
    """Whether the tokens of one sample can be spread over ranks (the mesh's sequence dimension)."""
    visits: torch.device | None = None
    """Device that a network of a sampling system goes to only while it works (`working`). None: it is where it works.
    """

    def blocks(self) -> list[nn.Module]:
        """The units of activation checkpointing, compilation and sharding, each called once in a forward pass."""
        raise NotImplementedError

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        """Mean loss over the micro-batch, with gradients, and further scalars. Nothing leaves the device."""
        raise NotImplementedError

    def evaluate(self, batch: Batch, draw: Draw) -> Logs:
        """Per-sample numbers (B,), comparable between runs: `loss`, and what else the system can measure."""
        raise NotImplementedError

    def sample(self, prompts: Sequence[str], clip: tuple[int, int, int], sampler: Sampler, draw: Draw) -> Tensor | None:
        """New clips (B, 3, T, H, W) in [-1, 1] of `clip` = (T, H, W); None where the system generates nothing."""
        return None

    def multiples(self) -> tuple[int, int, int]:
        """What frames, height and width of a sampled clip must be multiples of."""
        return 1, 1, 1

    def lost_tokens(self, prompt: str) -> int:
        """Tokens of a prompt that are cut off because it is too long."""
        return 0

    def reconstruct(self, batch: Batch, draw: Draw) -> Tensor | None:
        """The batch's clips through the autoencoder, (B, 3, T, H, W); None where there is none."""
        return None

    def export(self, folder: Path, weights: dict[str, dict[str, Tensor]]) -> None:
        """Write diffusers-format folders. `weights` are whole tensors by the names of `trained`: what
        `core.models.partly.exported` says of each network; and by the names of frozen networks that are spread.
        """
        for name, module in self.trained.items():
            if hasattr(module, "write"):
                module.write(folder, weights[name])  # type: ignore[operator]
            else:
                write_folder(module, folder / name, weights[name])
            if hasattr(module, "write_beside"):
                module.write_beside(folder)  # type: ignore[operator]
        for name, module in self.frozen.items():
            self.write_frozen(name, module, folder, weights[name] if name in weights else module.state_dict())

    def write_frozen(self, name: str, module: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
        """Write one frozen network of an export, with the whole tensors `state`."""
        write_folder(module, folder / name, state)

    def to(self, device: torch.device) -> System:
        """Move everything to `device`."""
        self.trained.to(device)
        self.frozen.to(device)
        return self

    @contextmanager
    def working(self, module: nn.Module) -> Iterator[None]:
        """`module` is on the device that it visits while this lasts, and then again in the host's memory."""
        if self.visits is None:
            yield
            return
        module.to(self.visits)
        try:
            yield
        finally:
            module.to("cpu")

    def mode(self, training: bool) -> None:
        """Train or eval mode of the trained networks; frozen ones are always in eval mode."""
        self.trained.train(training)
        self.frozen.eval()
