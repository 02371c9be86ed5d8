"""AnimateDiff (Guo et al. 2023, arXiv 2307.04725): motion modules for a frozen UNet of pictures, LoRA on them, and the
fine-tuning of the UNet on single frames that comes before.
"""

from core.slots import (
    EMA,
    AdamW,
    Checkpoint,
    CLIPText,
    ColourAndMotion,
    Data,
    Diffusion,
    FrameVAE,
    Loop,
    LoRA,
    MotionModules,
    MotionUNet,
    Objective,
    Optim,
    Recipe,
    Schedule,
    StableDiffusionUNet,
    StockDDIM,
    System,
    Tracking,
    Validation,
    register,
)
from data.slots import CaptionedVideos
from recipes.first_stage import TINY_KL_VAE
from recipes.lvdm import TINY_TEXT, WEBVID

BASE = "SG161222/Realistic_Vision_V5.1_noVAE"
ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-2"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LINEAR = Objective(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
SAMPLER = StockDDIM(num_inference_steps=25, guidance_scale=8.0, negative_prompt="bad quality, worse quality")
PREFIX = "masterpiece, bestquality, highlydetailed, ultradetailed"
PROMPTS = tuple(
    f"{PREFIX}, {text}"
    for text in (
        "Snow rocky mountains peaks canyon. Snow blanketed rocky mountains surround and shadow deep canyons.",
        "A drone view of celebration with Christma tree and fireworks, starry sky - background.",
        "Robot dancing in times square.",
        "Pacific coast, carmel by the sea ocean and waves.",
    )
)


@register("animatediff-full")
class AnimateDiffFull(Recipe):
    """AnimateDiff: the motion modules (453.2 M parameters) learn on WebVid from nothing; UNet, autoencoder and text
    encoder of Realistic Vision 5.1 stay frozen.

    Values of ms-swift's animatediff_sft with sft_type full on one GPU; its four: --nproc 4 --global-batch 256. There
    2.5 M clips took about 40 hours on four A100. From a published adapter instead of from nothing:
    --system.denoiser.motion.weights guoyww/animatediff-motion-adapter-v1-5-2.
    """

    data: Data = WEBVID.but(frame_stride=4)
    system: System = Diffusion(
        autoencoder=FrameVAE(weights=f"{BASE}/vae"),
        denoiser=MotionUNet(weights=f"{BASE}/unet"),
        conditions=(CLIPText(weights=BASE, dropout=0.1),),
        objective=LINEAR,
    )
    optim: Optim = AdamW(lr=1e-4, weight_decay=0.01, max_grad_norm=1.0)
    loop: Loop = Loop(epochs=1, global_batch=64, micro_batch=4, precision="fp16", seed=42, num_workers=4)
    validation: Validation = Validation(
        every=100, sample_every=100, batch_size=1, num_samples=4, sampler=SAMPLER, prompts=PROMPTS, fps=10
    )
    checkpoint: Checkpoint = Checkpoint(every=100)
    tracking: Tracking = Tracking(experiment="animatediff")


@register("animatediff-lora")
class AnimateDiffLoRA(AnimateDiffFull):
    """AnimateDiff: LoRA of rank 8 on the published motion modules (4.5 M parameters); everything else stays frozen.

    Values of ms-swift's animatediff_sft with sft_type lora on one GPU, which needed 20 GB. It put LoRA on proj_in and
    proj_out too (--system.denoiser.lora.targets all, 5,135,360 parameters), which stock pipelines of today cannot run.
    """

    system: System = AnimateDiffFull.system.but(
        denoiser=MotionUNet(
            weights=f"{BASE}/unet", motion=MotionModules(weights=ADAPTER), lora=LoRA(rank=8, alpha=32.0, dropout=0.05)
        )
    )
    loop: Loop = AnimateDiffFull.loop.but(global_batch=16, micro_batch=1)
    validation: Validation = AnimateDiffFull.validation.but(every=200, sample_every=200)
    checkpoint: Checkpoint = Checkpoint(every=200)


MOTION_LORA = LoRA(rank=64, alpha=64.0, dropout=0.0, targets="attention")


@register("animatediff-motion-lora")
class AnimateDiffMotionLoRA(AnimateDiffLoRA):
    """MotionLoRA: rank 64 on the projections of temporal attention alone (19.3 M parameters), for one kind of motion
    from a few clips.

    Rank and layers are those of the released files, whose training was not published; alpha is the rank, because those
    files hold none. The rest as in animatediff-lora.
    """

    system: System = AnimateDiffLoRA.system.but(
        denoiser=MotionUNet(
            weights=f"{BASE}/unet",
            motion=MotionModules(weights=ADAPTER),
            lora=MOTION_LORA,
        )
    )


@register("animatediff-image-finetune")
class AnimateDiffImageFinetune(Recipe):
    """AnimateDiff's first stage: the whole UNet of Stable Diffusion 1.5 (859.5 M parameters) learns on single frames of
    the videos, at low rate, so that motion modules need not learn their look.

    Values of the authors' training/v1/image_finetune.yaml; its 100 updates are a placeholder. The paper trains a LoRA
    here instead; its code was not published.
    """

    data: Data = WEBVID.but(num_frames=1)
    system: System = Diffusion(
        autoencoder=FrameVAE(weights=f"{SD15}/vae"),
        denoiser=StableDiffusionUNet(weights=f"{SD15}/unet"),
        conditions=(CLIPText(weights=SD15, dropout=0.1),),
        objective=Objective(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    optim: Optim = AdamW(lr=1e-5, weight_decay=0.01, max_grad_norm=1.0)
    loop: Loop = Loop(max_steps=100, global_batch=50, micro_batch=50, precision="fp16", seed=42, num_workers=32)
    validation: Validation = Validation(
        every=5000,
        sample_every=5000,
        batch_size=4,
        num_samples=4,
        sampler=SAMPLER.but(negative_prompt=""),
        prompts=tuple(prompt.removeprefix(f"{PREFIX}, ") for prompt in PROMPTS),
    )
    checkpoint: Checkpoint = Checkpoint(every=60)
    tracking: Tracking = Tracking(experiment="animatediff")


# ---------------------------------------------------------------------------------------------------------------- twins

SHIPPED = "shipped:animatediff-tiny"
TINY_UNET = StableDiffusionUNet(
    block_out_channels=(32, 64), layers_per_block=1, num_heads=4, context_dim=64, norm_num_groups=8, sample_size=8
)
TINY_MOTION = MotionModules(num_heads=4, max_length=8, source="shipped with this project", fetch="make weights")
TINY_MOTION_UNET = MotionUNet(
    weights=SHIPPED,
    source="shipped with this project",
    fetch="make weights",
    block_out_channels=TINY_UNET.block_out_channels,
    layers_per_block=TINY_UNET.layers_per_block,
    num_heads=TINY_UNET.num_heads,
    context_dim=TINY_UNET.context_dim,
    norm_num_groups=TINY_UNET.norm_num_groups,
    sample_size=TINY_UNET.sample_size,
    motion=TINY_MOTION,
)
TINY = Diffusion(
    autoencoder=TINY_KL_VAE.but(weights="shipped:kl-vae-tiny"),
    denoiser=TINY_UNET,
    conditions=(TINY_TEXT.but(max_length=77, dropout=0.1),),
    objective=Objective(prediction_type="v_prediction", beta_schedule="linear", beta_start=0.00085, beta_end=0.02),
)
TINY_VALIDATION = Validation(
    every=500,
    sample_every=1000,
    batch_size=8,
    num_samples=8,
    metric_clips=48,
    metric=ColourAndMotion(),
    sampler=StockDDIM(num_inference_steps=25, guidance_scale=2.0),
)


@register("animatediff-image-finetune-tiny")
class AnimateDiffImageFinetuneTiny(AnimateDiffImageFinetune):
    """Twin of animatediff-image-finetune: 0.8 M parameters on single frames of the captioned synthetic clouds at 64 x
    64, from nothing, minutes on two cores. animatediff-full-tiny can start from what it learns.

    denoiser.weights None: so small a UNet was never published. v-prediction (reference: epsilon) learns in minutes.
    beta_schedule linear up to beta_end 0.02 (reference: scaled_linear, 0.012), as for the motion that is learnt on top:
    an 8 x 8 latent still shows through less noise. fp32 (reference: fp16) and no worker: it is small. The prompts are
    held-out captions (reference: four of its own), with guidance 2 (reference: 8). The validation.metric is the share
    of 48 pictures whose colour is that of their captions: all of them after 3,000 updates.
    """

    data: Data = CaptionedVideos(num_frames=1, resolution=64)
    system: System = TINY
    optim: Optim = AdamW(
        lr=2e-3,
        weight_decay=0.01,
        max_grad_norm=1.0,
        schedule=Schedule(name="cosine", warmup_steps=30),
        ema=EMA(decay=0.995),
    )
    loop: Loop = Loop(max_steps=3000, global_batch=16, micro_batch=16, seed=42)
    validation: Validation = TINY_VALIDATION
    checkpoint: Checkpoint = Checkpoint(every=500)


@register("animatediff-full-tiny")
class AnimateDiffFullTiny(AnimateDiffFull):
    """Twin of animatediff-full: motion modules of 0.4 M parameters learn on captioned synthetic clouds at 64 x 64,
    minutes on two cores; the frozen UNet of 0.8 M ships with the project.

    v-prediction and beta_end 0.02 (reference: epsilon, 0.012) are what the frozen UNet was trained with. frame_stride 1
    (reference: 4), because the synthetic clips have 8 frames. fp32 (reference: fp16) and no worker: it is small. The
    prompts are held-out captions (reference: four of its own), with guidance 2 and no negative_prompt (reference: 8 and
    one); eight clips a second are written (fps; reference: 10). The validation.metric is the share of 48 clips whose
    colour, direction and speed are those of their captions: 1.0, 0.92 and 0.85 after 2,000 updates, where guessing gets
    0.17, 0.25 and 0.5.
    """

    data: Data = CaptionedVideos(num_frames=8, resolution=64)
    system: System = TINY.but(denoiser=TINY_MOTION_UNET)
    optim: Optim = AnimateDiffImageFinetuneTiny.optim
    loop: Loop = Loop(max_steps=2000, global_batch=8, micro_batch=8, seed=42)
    validation: Validation = TINY_VALIDATION
    checkpoint: Checkpoint = Checkpoint(every=500)


@register("animatediff-lora-tiny")
class AnimateDiffLoRATiny(AnimateDiffFullTiny):
    """Twin of animatediff-lora: LoRA on the motion modules that ship with the project, on captioned synthetic clouds,
    which these know already. For other clips: --data-root and a low --lr; 5e-5 keeps what they know, 2e-4 does not.

    As in animatediff-full-tiny: v-prediction, beta_end, frame_stride, fp32, no worker, held-out captions as prompts,
    guidance 2 and no negative_prompt, fps, and the validation.metric.
    """

    system: System = TINY.but(denoiser=TINY_MOTION_UNET.but(motion=TINY_MOTION.but(weights=SHIPPED), lora=LoRA()))
    loop: Loop = AnimateDiffFullTiny.loop.but(max_steps=500)


@register("animatediff-motion-lora-tiny")
class AnimateDiffMotionLoRATiny(AnimateDiffLoRATiny):
    """Twin of animatediff-motion-lora: rank 64 where the layers are 32 and 64 wide.

    As in animatediff-full-tiny: v-prediction, beta_end, frame_stride, fp32, no worker, held-out captions as prompts,
    guidance 2 and no negative_prompt, fps, and the validation.metric.
    """

    system: System = TINY.but(denoiser=TINY_MOTION_UNET.but(motion=TINY_MOTION.but(weights=SHIPPED), lora=MOTION_LORA))
