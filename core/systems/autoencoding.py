"""Autoencoding: the first stage, reconstruction + KL. Its latents' shift and scale are measured and kept with the
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.draw import Draw
from core.objective import LOSSES
from core.slots import Autoencoding
from core.systems import Batch, Logs, System


class AutoencodingSystem(System):
    """loss = reconstruction(decode(z), x) + kl_weight · KL, z a sample of the posterior."""

    def __init__(self, slot: Autoencoding) -> None:
        self.slot = slot
        self.trained = nn.ModuleDict({slot.autoencoder.component: slot.autoencoder.build()})
        self.frozen = nn.ModuleDict()
        self.vae = self.trained[slot.autoencoder.component]

    def blocks(self) -> list[nn.Module]:
        return self.vae.blocks()  # type: ignore[operator, no-any-return]

    def _parts(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions, and per sample (B,) the reconstruction loss and the KL of a latent element."""
        video = batch["pixel_values"]
        # the one entry point keeps the module's root hooks (sharding) in the call
        decoded, posterior = self.vae(video, draw.noise(self.vae.latent_shape(*video.shape[2:]), "posterior"))  # type: ignore[operator]
        elements = posterior.mean[0].numel()
        return decoded.float(), LOSSES[self.slot.loss](decoded.float(), video), posterior.kl().float() / elements

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, Logs]:
        _, reconstruction, kl = self._parts(batch, draw)
        loss = reconstruction.mean() + self.slot.kl_weight * kl.mean()
        return loss, {"reconstruction": reconstruction.mean().detach(), "kl": kl.mean().detach()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, draw: Draw) -> Logs:
        decoded, reconstruction, kl = self._parts(batch, draw)
        quality = 10.0 * torch.log10(4.0 / LOSSES["mse"](decoded, batch["pixel_values"]))  # dB; the peak is 2
        return {
            "loss": reconstruction + self.slot.kl_weight * kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "psnr": quality,
        }

    @torch.no_grad()
    def reconstruct(self, batch: Batch, draw: Draw) -> Tensor:
        return self._parts(batch, draw)[0].clamp(-1, 1)
