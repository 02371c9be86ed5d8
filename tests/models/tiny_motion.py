"""A stock AnimateDiff pipeline whose UNet has 35 thousand parameters, and what stock classes do with its motion modules."""

import functools

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

SIZES = {"block_out_channels": (8, 8), "motion_layers_per_block": 1, "motion_norm_num_groups": 2}
HEADS = {"motion_num_attention_heads": 4}
ATTENTION = r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0)"
NO_PROJ = r".*motion_modules.*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
ALL = rf"{NO_PROJ}|.*motion_modules\.\d+\.proj_(in|out)"


def filled(module, seed):
    """The module with every weight drawn, so that none is zero or one: what is lost shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def adapter(seed=1, **changes):
    return filled(MotionAdapter(**(SIZES | HEADS | changes)), seed)


def image_unet(seed=2):
    return filled(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=2,
        ),
        seed,
    )


def motion_unet(motion=None):
    return UNetMotionModel.from_unet2d(image_unet(), adapter() if motion is None else motion).eval()


@functools.cache
def around():
    """Autoencoder and text encoder, which no test changes."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = CLIPTextConfig(**sizes, vocab_size=100, bos_token_id=98, eos_token_id=99)
    return {"vae": filled(vae, 3), "text_encoder": CLIPTextModel(text)}


def pipeline(motion=None, unet=None):
    """With a MotionAdapter as it is opened by people, or with a whole UNet."""
    pipe = AnimateDiffPipeline(
        **around(),
        tokenizer=None,
        unet=unet if unet is not None else image_unet(),
        motion_adapter=motion if motion is not None or unet is not None else adapter(),
        # one step from pure noise: a step from the least noise would hardly show what the UNet does
        scheduler=DDIMScheduler(1000, 0.00085, 0.012, "linear", clip_sample=False, timestep_spacing="trailing"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe):
    """(1, 4, 3, 16, 16) in fp32, of one noise and one text; only what the pipeline holds makes a difference."""
    text, nothing = (torch.randn(1, 77, 8, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=nothing,
        num_frames=4,
        height=16,
        width=16,
        num_inference_steps=1,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(6),
        output_type="pt",
    ).frames


def with_lora(unet, targets=NO_PROJ, rank=2, alpha=8, seed=7, **config):
    """The UNet with a LoRA as PEFT puts it in, whose B is not zero."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **config), "default")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return unet.eval()


def lora_state(unet):
    """<layer>.lora_A.weight and lora_B, as PEFT names them."""
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(unet).items()}


def called_as_before(unet):
    """proj_in and proj_out of motion modules are called with a keyword that PEFT's layer does not take: turn it."""
    for name, module in unet.named_modules():
        if name.rpartition(".")[2] in ("proj_in", "proj_out") and "motion_modules" in name:
            module.register_forward_pre_hook(
                lambda _module, args, kwargs: ((*args, kwargs.pop("input")) if "input" in kwargs else args, kwargs),
                with_kwargs=True,
            )
    return unet
