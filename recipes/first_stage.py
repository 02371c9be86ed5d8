"""First stages that several families share: autoencoders whose latents the denoisers of other recipes work on."""

from pathlib import Path

from core.slots import (
    AdamW,
    Autoencoding,
    Checkpoint,
    Data,
    FrameVAE,
    Loop,
    Optim,
    Recipe,
    Schedule,
    System,
    Tracking,
    Validation,
    register,
)
from data.slots import CaptionedVideos

TINY_KL_VAE = FrameVAE(
    block_out_channels=(8, 16, 32, 32),
    layers_per_block=1,
    norm_num_groups=4,
    scale_factor=None,
    shift_factor=None,
    source="shipped with this project",
    fetch="make weights",
)


@register("kl-vae")
class KLVAE(Recipe):
    """The KL autoencoder of Stable Diffusion (83.7 M parameters, 8x8 in space, 4 channels) on single frames of videos.

    Values of CompVis/latent-diffusion, autoencoder_kl_32x32x4: Adam betas (0.5, 0.9), lr 4.5e-6 a sample of the update,
    batch 12, accumulation 2, 256 x 256, KL weight 1e-6. Theirs adds LPIPS and, from step 50,001, a patch discriminator;
    both need outside weights or a second optimizer and are not here, so expect softer reconstructions than the
    published autoencoder's. Cost: 2.7 TFLOP a frame forward and backward.
    """

    data: Data = CaptionedVideos(root=Path("datasets/webvid"), num_frames=1, resolution=256)
    system: System = Autoencoding(autoencoder=FrameVAE(), loss="l1", kl_weight=1e-6)
    optim: Optim = AdamW(lr=1.08e-4, betas=(0.5, 0.9), weight_decay=0.0)
    loop: Loop = Loop(max_steps=500_000, global_batch=24, micro_batch=12, seed=23)
    validation: Validation = Validation(every=1000, sample_every=1000)
    tracking: Tracking = Tracking(experiment="first-stage")


@register("kl-vae-tiny")
class KLVAETiny(KLVAE):
    """Twin of kl-vae: 0.25 M parameters on the synthetic clouds at 64 x 64, five minutes on two cores.

    The loss is MSE (reference: L1): a cloud covers a tenth of a picture, and L1 takes long to see it at all. A sample
    is two frames, num_frames 2 with frame_stride 4 (reference: one), because opening a file takes as long as decoding
    it. Expected: 29 dB PSNR on held-out frames. The weights that ship have gone on for 500 steps with kl_weight 2e-4,
    which makes room for every colour in the latents (make weights).
    """

    data: Data = CaptionedVideos(num_frames=2, frame_stride=4, resolution=64)
    system: System = Autoencoding(autoencoder=TINY_KL_VAE, loss="mse", kl_weight=1e-6)
    optim: Optim = AdamW(
        lr=3e-3,
        betas=(0.5, 0.9),
        weight_decay=0.0,
        max_grad_norm=1.0,
        schedule=Schedule(name="cosine", warmup_steps=30),
    )
    loop: Loop = Loop(max_steps=1500, global_batch=8, micro_batch=8, seed=23)
    validation: Validation = Validation(every=200, sample_every=1000, batch_size=8)
    checkpoint: Checkpoint = Checkpoint(every=200)
