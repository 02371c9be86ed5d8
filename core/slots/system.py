"""System slots: what turns a batch into a loss, and noise into samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from core.slots.autoencoder import Autoencoder
from core.slots.condition import Condition
from core.slots.denoiser import Denoiser
from core.slots.objective import Objective
from core.slots.slot import Slot, SlotError

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

    def check(self) -> None:
        width: int | None = getattr(self.denoiser, "context_dim", None)
        kind = type(self.denoiser).__name__
        if len(self.conditions) > 1:
            self.refuse("conditions", "one text at a time: a denoiser takes one sequence of states")
        if self.conditions and width is None:
            self.refuse("conditions", f"{kind} is told nothing; take a denoiser with a context_dim, or no conditions")
        if width is not None and not self.conditions:
            self.refuse("conditions", f"{kind} is told a text: add one, for example --system.conditions=CLIPText")
        for condition in self.conditions:
            wide = getattr(condition, "hidden_size", width)
            if wide != width:
                raise SlotError(
                    f"denoiser.context_dim = {width}: must be the hidden_size of {type(condition).__name__}, {wide}"
                )

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
