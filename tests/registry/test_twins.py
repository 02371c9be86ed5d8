"""A tiny twin is its full-size recipe with other sizes, paths and schedule, and with what its docstring names; nothing else."""

import fnmatch

import pytest

import registry
from core.verbs.diff import differences
from tests.golden_recipes import own_names

SIZES = [
    "data.resolution",
    "data.num_frames",
    "system.autoencoder.n_hiddens",
    "system.autoencoder.norm_num_groups",
    "system.autoencoder.block_out_channels",
    "system.autoencoder.layers_per_block",
    "system.conditions.0.max_length",
    "system.conditions.0.hidden_size",
    "system.conditions.0.intermediate_size",
    "system.conditions.0.num_hidden_layers",
    "system.conditions.0.num_attention_heads",
    "system.conditions.0.vocab_size",
    "system.conditions.0.head_dim",
    "system.denoiser.model_channels",
    "system.denoiser.channel_mult",
    "system.denoiser.num_res_blocks",
    "system.denoiser.num_heads",
    "system.denoiser.attention_resolutions",
    "system.denoiser.context_dim",
    "system.denoiser.temporal_length",
    "system.denoiser.block_out_channels",
    "system.denoiser.layers_per_block",
    "system.denoiser.norm_num_groups",
    "system.denoiser.sample_size",
    "system.denoiser.motion.num_heads",
    "system.denoiser.motion.max_length",
    "loop.global_batch",
    "loop.micro_batch",
    "validation.batch_size",
    "validation.num_batches",
    "validation.num_samples",
    "validation.metric_clips",
]
PATHS = [
    "data.root",
    "data.source",
    "data.fetch",
    "system.autoencoder.weights",
    "system.autoencoder.source",
    "system.autoencoder.fetch",
    "system.autoencoder.scale_factor",  # a constant of the weights
    "system.autoencoder.shift_factor",
    "system.denoiser.weights",
    "system.denoiser.source",
    "system.denoiser.fetch",
    "system.denoiser.motion.weights",
    "system.denoiser.motion.source",
    "system.denoiser.motion.fetch",
    "system.conditions.0.weights",
    "system.conditions.0.tokenizer",
    "system.conditions.0.source",
    "system.conditions.0.fetch",
]
SCHEDULE = [
    "optim.lr",
    "optim.schedule.*",
    "optim.groups*",
    "optim.max_grad_norm",
    "optim.ema",
    "optim.ema.*",
    "loop.max_steps",
    "loop.epochs",
    "loop.log_every",
    "validation.every",
    "validation.sample_every",
    "checkpoint.every",
    "checkpoint.keep",
]
MOTION = {
    "data.frame_stride": "frame_stride",
    "system.objective.prediction_type": "v-prediction",
    "system.objective.beta_end": "beta_end",
    "loop.precision": "fp32",
    "loop.num_workers": "worker",
    "validation.metric": "metric",
    "validation.prompts": "prompts",
    "validation.fps": "fps",
    "validation.sampler.guidance_scale": "guidance",
    "validation.sampler.negative_prompt": "negative_prompt",
}
NAMED = {  # twin → field → the word of its docstring that names it
    "lvdm-video-vae-tiny": {"system.kl_weight": "kl_weight", "data.spatial_transform": "crops"},
    "lvdm-short-sky-tiny": {
        "system.objective.prediction_type": "v-prediction",
        "system.objective.loss": "MSE",
        "validation.sampler.eta": "eta",
    },
    "lvdm-text2video-tiny": {
        "system.objective.prediction_type": "v-prediction",
        "system.conditions.0.dropout": "dropout",
        "system.denoiser.frame_positions": "frame_positions",
        "system.denoiser.norm_num_groups": "norm_num_groups",
        "loop.precision": "fp32",
        "loop.activation_checkpointing": "checkpointing",
        "loop.num_workers": "worker",
        "system.objective.beta_end": "beta_end",
        "validation.metric": "metric",
        "validation.sampler.eta": "eta",
        "validation.sampler.guidance_scale": "guidance",
        "validation.sampler.num_inference_steps": "steps",
    },
    "ldm-laion400m-tiny": {
        "system.objective.prediction_type": "v-prediction",
        "system.objective.beta_end": "beta_end",
        "system.conditions.0.embedding_std": "embedding_std",
        "loop.num_workers": "worker",
        "validation.metric": "metric",
        "validation.sampler.guidance_scale": "guidance",
        "validation.sampler.num_inference_steps": "steps",
    },
    "animatediff-image-finetune-tiny": {
        "system.objective.prediction_type": "v-prediction",
        "system.objective.beta_schedule": "beta_schedule",
        "system.objective.beta_end": "beta_end",
        "loop.precision": "fp32",
        "loop.num_workers": "worker",
        "validation.prompts": "prompts",
        "validation.sampler.guidance_scale": "guidance",
        "validation.metric": "validation.metric",
    },
    "animatediff-full-tiny": MOTION,
    "animatediff-lora-tiny": MOTION,
    "animatediff-motion-lora-tiny": MOTION,
    "kl-vae-tiny": {"system.loss": "MSE", "data.frame_stride": "frame_stride"},
}
TWINS = [name for name in own_names() if name.endswith("-tiny")]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_differs_only_in_sizes_paths_schedule_and_what_its_docstring_names(name):
    full, twin = registry.get(name.removesuffix("-tiny")), registry.get(name)
    paths = [difference.path for difference in differences(full, twin)]
    named = NAMED.get(name, {})
    allowed = [*SIZES, *PATHS, *SCHEDULE, *named]
    assert [p for p in paths if not any(fnmatch.fnmatch(p, pattern) for pattern in allowed)] == []
    assert {field for field, word in named.items() if word not in (type(twin).__doc__ or "")} == set()
    assert set(named) <= set(paths), "an exception that is no longer used"


def test_there_are_twins_and_each_has_its_full_size_recipe():
    assert TWINS
    assert {name.removesuffix("-tiny") for name in TWINS} <= set(own_names())
