"""LVDM (He et al. 2022, arXiv 2211.13221): video autoencoder and unconditional latent diffusion on Sky Timelapse,
and latent diffusion from text on WebVid.
"""

from pathlib import Path

from core.slots import (
    DDIM,
    EMA,
    AdamW,
    Autoencoding,
    Checkpoint,
    CLIPText,
    ColourAndMotion,
    Data,
    Diffusion,
    FrameVAE,
    Loop,
    LVDMShortUNet,
    LVDMTextUNet,
    Objective,
    Optim,
    Recipe,
    Schedule,
    System,
    Tracking,
    Validation,
    VideoVAE,
    register,
)
from data.slots import CaptionedVideos, FrameFolders
from recipes.first_stage import TINY_KL_VAE

SKY = FrameFolders(
    root=Path("datasets/sky_timelapse"),
    split="train",
    num_frames=16,
    resolution=256,
    source="Sky Timelapse, github.com/weixiong-ur/mdgan; the command gets a small sample in the same layout",
    fetch=(
        "mkdir -p datasets && cd datasets && curl -LO https://paddlenlp.bj.bcebos.com/models/community/westfish/"
        "lvdm_datasets/sky_timelapse_lvdm.zip && unzip sky_timelapse_lvdm.zip"
    ),
)
WEBVID = CaptionedVideos(
    root=Path("datasets/webvid"),
    num_frames=16,
    resolution=256,
    source="WebVid, github.com/m-bain/webvid: tables of captions and addresses; any csv of names and paths will do",
)
TINY_TEXT = CLIPText(
    weights="shipped:clip-text-tiny",
    max_length=24,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=579,
    source="shipped with this project",
    fetch="make weights",
)
TINY_VAE = VideoVAE(n_hiddens=4, norm_num_groups=4, source="shipped with this project", fetch="make weights")


@register("lvdm-video-vae")
class LVDMVideoVAE(Recipe):
    """The 3D autoencoder of LVDM on Sky Timelapse: L1 + KL.

    Values of the authors' configuration: Adam betas (0.5, 0.9), lr 3.6e-5, batch 1, accumulation 2, clips of 16 x 256 x
    256. Theirs adds LPIPS and, from step 50,001, a patch discriminator; both need outside weights or a second optimizer
    and are not here, so expect softer reconstructions. Cost: 9.1 TFLOP a sample forward and backward.
    """

    data: Data = SKY
    system: System = Autoencoding(autoencoder=VideoVAE(), loss="l1", kl_weight=0.0)
    optim: Optim = AdamW(lr=3.6e-5, betas=(0.5, 0.9), weight_decay=0.0)
    loop: Loop = Loop(epochs=1000, global_batch=2, micro_batch=1, seed=23)
    validation: Validation = Validation(every=1000, sample_every=1000)
    tracking: Tracking = Tracking(experiment="lvdm")


@register("lvdm-video-vae-tiny")
class LVDMVideoVAETiny(LVDMVideoVAE):
    """Twin of lvdm-video-vae: 0.32 M parameters, 32-pixel crops of the synthetic sky, eight minutes on two cores.

    kl_weight 1e-4 (reference 0): it keeps the latents near unit variance, which the short training of the denoiser
    needs. Expected: 32 dB PSNR on held-out crops.
    """

    data: Data = FrameFolders(num_frames=16, resolution=32, spatial_transform="random_crop")
    system: System = Autoencoding(autoencoder=TINY_VAE, loss="l1", kl_weight=1e-4)
    optim: Optim = AdamW(lr=2e-3, betas=(0.5, 0.9), weight_decay=0.0, schedule=Schedule(name="cosine", warmup_steps=30))
    loop: Loop = Loop(max_steps=4000, global_batch=4, micro_batch=4, seed=23)
    validation: Validation = Validation(every=500, sample_every=2000)
    checkpoint: Checkpoint = Checkpoint(every=1000)


@register("lvdm-short-sky")
class LVDMShortSky(Recipe):
    """Unconditional LVDM on Sky Timelapse: the UNet (548.9 M parameters) learns, the 3D autoencoder stays frozen.

    Values of PaddleMIX's train_lvdm_short_sky.sh. Paper: FVD 95.2 (16 frames, 256 x 256); an independent run of the
    published weights gave 318.7. Weights: hub Yingqing/LVDM, lvdm_short/short_sky.ckpt and ae/ae_sky.ckpt.
    Cost: 1.08 TFLOP a sample for the denoiser and its gradients, 0.19 for the encoder; the authors' configuration is
    for 32 GPUs.
    """

    data: Data = SKY
    system: System = Diffusion(
        autoencoder=VideoVAE(scale_factor=0.33422927, shift_factor=1.4606637),
        denoiser=LVDMShortUNet(),
        objective=Objective(prediction_type="epsilon", loss="l1", beta_start=0.0015, beta_end=0.0155),
    )
    optim: Optim = AdamW(lr=6e-5, weight_decay=0.01)
    loop: Loop = Loop(max_steps=1_000_000_000, global_batch=1, micro_batch=1, seed=23, log_every=1)
    validation: Validation = Validation(every=5, sample_every=10, batch_size=1, num_samples=2, sampler=DDIM(eta=1.0))
    checkpoint: Checkpoint = Checkpoint(every=5000, keep=None)
    tracking: Tracking = Tracking(experiment="lvdm")


@register("lvdm-short-sky-tiny")
class LVDMShortSkyTiny(LVDMShortSky):
    """Twin of lvdm-short-sky: 1.4 M parameters on the synthetic sky at 64 x 64, three to four minutes on two cores.

    v-prediction with MSE (reference: epsilon with L1) and gradients clipped at norm 1 learn moving clouds in minutes;
    epsilon needs hours. eta 0.5 (reference: 1) scores best of 0, 0.5 and 1 at this size. Expected: Fréchet distance of
    48 clips at most twice that of a second real sample.
    """

    data: Data = FrameFolders(num_frames=16, resolution=64)
    system: System = Diffusion(
        autoencoder=TINY_VAE.but(weights="shipped:lvdm-video-vae-tiny"),
        denoiser=LVDMShortUNet(
            model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(1, 2, 4), num_heads=2
        ),
        objective=Objective(prediction_type="v_prediction", loss="mse", beta_start=0.0015, beta_end=0.0155),
    )
    optim: Optim = AdamW(
        lr=4e-3,
        weight_decay=0.01,
        max_grad_norm=1.0,
        schedule=Schedule(name="cosine", warmup_steps=30),
        ema=EMA(decay=0.995),
    )
    loop: Loop = Loop(max_steps=1800, global_batch=8, micro_batch=8, seed=23)
    validation: Validation = Validation(
        every=300, sample_every=900, batch_size=8, num_samples=4, metric_clips=48, sampler=DDIM(eta=0.5)
    )
    checkpoint: Checkpoint = Checkpoint(every=600)


@register("lvdm-text2video")
class LVDMText2Video(Recipe):
    """LVDM from text on WebVid: the UNet (958.9 M parameters) learns; autoencoder (Stable Diffusion's) and text encoder
    (CLIP) stay frozen.

    Values of PaddleMIX's train_lvdm_text2video.py and its script on one GPU; its four: --nproc 4 --global-batch 32.
    The script stops after 100 updates: give --max-steps. It asks for a frame stride of 4 and then reads consecutive
    frames: frame_stride is 1. It never leaves a caption out (system.conditions.0.dropout 0) although its samples are
    guided: 0.1 is a good default for guidance. No figure of merit was published. Weights: hub Yingqing/LVDM,
    lvdm_short/t2v.ckpt. Cost: 12.7 TFLOP a sample for the denoiser, its gradients and recomputation, 4.4 for encoding.
    """

    data: Data = WEBVID
    system: System = Diffusion(
        autoencoder=FrameVAE(scale_factor=0.18215, shift_factor=0.0),
        denoiser=LVDMTextUNet(),
        conditions=(CLIPText(max_length=77, dropout=0.0),),
        objective=Objective(prediction_type="epsilon", loss="mse", beta_start=0.00085, beta_end=0.012),
    )
    optim: Optim = AdamW(lr=6e-5, weight_decay=0.01)
    loop: Loop = Loop(
        max_steps=100,
        global_batch=8,
        micro_batch=4,
        precision="fp16",
        seed=23,
        activation_checkpointing=True,
        num_workers=8,
        log_every=50,
    )
    validation: Validation = Validation(
        every=1000, sample_every=1000, batch_size=4, num_samples=2, sampler=DDIM(eta=1.0, guidance_scale=9.0)
    )
    checkpoint: Checkpoint = Checkpoint(every=5000, keep=None)
    tracking: Tracking = Tracking(experiment="lvdm")


@register("lvdm-text2video-tiny")
class LVDMText2VideoTiny(LVDMText2Video):
    """Twin of lvdm-text2video: 1.2 M parameters on captioned synthetic clouds at 64 x 64, ten minutes on two cores.

    v-prediction (reference: epsilon) and gradients clipped at norm 1 learn moving clouds in minutes. beta_end 0.02
    (reference: 0.012), because a clip of 8 x 8 latents still shows through the reference's last noise, and what shows
    need not be read from the text. dropout 0.1 (reference: 0), because samples are guided. frame_positions are on
    (reference: off): with relative positions alone the direction of a drift stays at chance. norm_num_groups 8
    (reference: 32), because the norm of a single channel takes out what the text added to it. fp32 (reference: fp16),
    no checkpointing and no workers: it is small. Samples take 25 steps with eta 0 and guidance 2 (reference: 50, 1 and
    9). The validation.metric is the share of 48 clips whose colour, direction and speed are those of their captions.
    Expected: 0.9 of each (chance: 0.17, 0.25 and 0.5).
    """

    data: Data = CaptionedVideos(num_frames=8, resolution=64)
    system: System = Diffusion(
        autoencoder=TINY_KL_VAE.but(weights="shipped:kl-vae-tiny"),
        denoiser=LVDMTextUNet(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(1, 2),
            num_heads=4,
            context_dim=64,
            temporal_length=8,
            norm_num_groups=8,
            frame_positions=True,
        ),
        conditions=(TINY_TEXT.but(dropout=0.1),),
        objective=Objective(prediction_type="v_prediction", loss="mse", beta_start=0.00085, beta_end=0.02),
    )
    optim: Optim = AdamW(
        lr=3e-3,
        weight_decay=0.01,
        max_grad_norm=1.0,
        schedule=Schedule(name="cosine", warmup_steps=30),
        ema=EMA(decay=0.995),
    )
    loop: Loop = Loop(max_steps=2000, global_batch=8, micro_batch=8, seed=23)
    validation: Validation = Validation(
        every=500,
        sample_every=1000,
        batch_size=8,
        num_samples=8,
        metric_clips=48,
        metric=ColourAndMotion(),
        sampler=DDIM(num_inference_steps=25, guidance_scale=2.0),
    )
    checkpoint: Checkpoint = Checkpoint(every=500)
