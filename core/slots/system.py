"""System slots: what turns a batch into a loss, and noise into samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from core.slots.autoencoder import Autoencoder
from core.slots.condition import Condition
from core.slots.denoiser import Denoiser
from core.slots.objective import Objective
from core.slots.slot import Slot

if TYPE_CHECKING:
    from core.systems import System as BuiltSystem

Attention = Literal["sdpa", "xformers", "flash", "eager"]


class System(Slot):
    """Base of the systems; see `core/systems` for the interface that the loop uses."""

    attention: Attention = "sdpa"
    """Attention kernel. All give the same output; one that does not work here falls back to sdpa with a warning."""

    def build(self) -> BuiltSystem:
        """The modules with fresh weights, on torch's current default device."""
        raise NotImplementedError


class Diffusion(System):
    """A denoiser trained in the latent space of a frozen autoencoder, or on pixels where there is none."""

    autoencoder: Autoencoder | None = None
    """Frozen. None: the denoiser works on pixels."""
    denoiser: Denoiser
    """The network that is trained."""
    conditions: tuple[Condition, ...] = ()
    """What the denoiser is told besides the noisy sample."""
    objective: Objective = Objective()
    """Noise schedule, target and loss."""

    def build(self) -> BuiltSystem:
        from core.systems.diffusion import DiffusionSystem

        return DiffusionSystem(self)


class Autoencoding(System):
    """An autoencoder trained to give its input back: reconstruction loss + KL."""

    autoencoder: Autoencoder
    """The network that is trained."""
    loss: Literal["l1", "mse"] = "l1"
    """Reconstruction loss, averaged over pixels."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence to a unit normal, averaged over latent elements."""

    def check(self) -> None:
        if self.kl_weight < 0:
            self.refuse("kl_weight", "must not be negative")

    def build(self) -> BuiltSystem:
        from core.systems.autoencoding import AutoencodingSystem

        return AutoencodingSystem(self)
