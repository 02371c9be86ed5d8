"""LDM (Rombach et al. 2022, arXiv 2112.10752): pictures from text, UNet and text encoder trained from scratch."""

from pathlib import Path

from core.slots import (
    DDIM,
    EMA,
    AdamW,
    Checkpoint,
    ColourAndMotion,
    Data,
    Diffusion,
    FrameVAE,
    LDMBert,
    LDMUNet,
    Loop,
    Objective,
    Optim,
    ParamGroup,
    Recipe,
    Schedule,
    System,
    Tracking,
    Validation,
    register,
)
from data.slots import Base64Parts
from recipes.first_stage import TINY_KL_VAE

LAION = Base64Parts(
    root=Path("datasets/laion400m"),
    resolution=256,
    source="LAION-400M, laion.ai/blog/laion-400-open-dataset: captions and addresses, to be fetched with img2dataset",
)


@register("ldm-laion400m")
class LDMLaion400M(Recipe):
    """LDM from text on LAION-400M, from scratch: UNet (872.3 M parameters) and a text encoder of 32 layers (542.9 M)
    learn together; the autoencoder (Stable Diffusion's) stays frozen.

    Values of PaddleMIX's text_to_image_laion400m on one GPU, whose two loops are one here; its eight: --nproc 8
    --global-batch 480. Expected after 120,000 updates, DDIM, 1,000 captions of COCO: FID 60.9 at a CLIP score of 27.0;
    the paper's run (680 samples an update, 390,000 updates, lr 1e-4) has FID 12.6 at guidance 1.5 on MS-COCO. Weights:
    hub CompVis/ldm-text2im-large-256. Cost: 0.78 TFLOP a sample for both networks and their gradients, 0.27 for
    encoding.
    """

    data: Data = LAION
    system: System = Diffusion(
        autoencoder=FrameVAE(scale_factor=0.18215, shift_factor=0.0),
        denoiser=LDMUNet(),
        conditions=(LDMBert(max_length=77, dropout=0.1),),
        objective=Objective(prediction_type="epsilon", loss="mse", beta_start=0.00085, beta_end=0.012),
    )
    optim: Optim = AdamW(lr=4.6875e-5, weight_decay=0.02)
    loop: Loop = Loop(max_steps=1_000_000_000, global_batch=60, micro_batch=6, seed=23, num_workers=6, log_every=50)
    validation: Validation = Validation(
        every=1000, sample_every=1000, num_samples=8, sampler=DDIM(num_inference_steps=200, guidance_scale=7.5)
    )
    checkpoint: Checkpoint = Checkpoint(every=5000, keep=50)
    tracking: Tracking = Tracking(experiment="ldm")


@register("ldm-laion400m-12")
class LDMLaion400M12(LDMLaion400M):
    """ldm-laion400m with a text encoder of 12 layers (99.1 M parameters), 768 wide; UNet 859.5 M.

    The original's second configuration. Cost: 0.58 TFLOP a sample for both networks and their gradients, 0.27 for
    encoding.
    """

    system: System = LDMLaion400M.system.but(
        denoiser=LDMUNet(context_dim=768),
        conditions=(
            LDMBert(max_length=77, dropout=0.1, hidden_size=768, intermediate_size=3072, num_hidden_layers=12),
        ),
    )


@register("ldm-laion400m-tiny")
class LDMLaion400MTiny(LDMLaion400M):
    """Twin of ldm-laion400m: 1.9 M parameters on captioned synthetic pictures at 64 x 64, minutes on two cores.

    v-prediction (reference: epsilon) and gradients clipped at norm 1 learn in minutes. beta_end 0.02 (reference:
    0.012), because an 8 x 8 latent still shows through the reference's last noise. embedding_std 1 (reference: 0.02)
    and groups that give the text encoder a fifth of the learning rate: without one of the two no place is learnt. No
    worker reads data: they are small. Samples take 25 steps and guidance 3 (reference: 200 and 7.5). The
    validation.metric is the share of 120 pictures whose colour, shape and place are those of their captions. Expected:
    0.82, 0.48 and 0.76 (chance: 0.17, 0.25 and 0.2); Fréchet 2.1 (a second real sample: 1.9). With max_length 16, which
    the stock pipeline does not take, 0.89, 0.57 and 1.0.
    """

    data: Data = Base64Parts(resolution=64)
    system: System = Diffusion(
        autoencoder=TINY_KL_VAE.but(weights="shipped:kl-vae-tiny"),
        denoiser=LDMUNet(
            block_out_channels=(48, 96),
            layers_per_block=1,
            num_heads=2,
            context_dim=64,
            norm_num_groups=8,
            sample_size=8,
        ),
        conditions=(
            LDMBert(
                tokenizer="shipped:word-pieces-tiny",
                max_length=77,
                dropout=0.1,
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                head_dim=32,
                embedding_std=1.0,
                source="shipped with this project",
                fetch="make weights",
            ),
        ),
        objective=Objective(prediction_type="v_prediction", loss="mse", beta_start=0.00085, beta_end=0.02),
    )
    optim: Optim = AdamW(
        lr=2e-3,
        groups=(ParamGroup(pattern=r"^text_encoder\.", lr_scale=0.2),),
        weight_decay=0.02,
        max_grad_norm=1.0,
        schedule=Schedule(name="cosine", warmup_steps=30),
        ema=EMA(decay=0.995),
    )
    loop: Loop = Loop(max_steps=3000, global_batch=16, micro_batch=16, seed=23)
    validation: Validation = Validation(
        every=500,
        sample_every=1000,
        batch_size=8,
        num_samples=8,
        metric_clips=120,
        metric=ColourAndMotion(),
        sampler=DDIM(num_inference_steps=25, guidance_scale=3.0),
    )
    checkpoint: Checkpoint = Checkpoint(every=500)
