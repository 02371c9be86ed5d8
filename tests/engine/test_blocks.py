"""Activation checkpointing of all blocks or some, all operators or some."""

import pytest
import torch

from core.blocks import checkpoint_blocks
from core.errors import UserError
from core.plan import activation_bytes
from core.precision import autocast
from core.slots import Loop
from registry import get

NAME = "lvdm-text2video-tiny"
SOME = {
    "every block": {},
    "products and attention kept": {"recompute_keep": ("products", "attention")},
    "all three kept": {"recompute_keep": ("products", "attention", "convolutions")},
    "both": {"recompute_every": 3, "recompute_keep": ("convolutions",)},
}


class Alone:
    """A denoiser as the only part of a system."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def blocks(self):
        return self.denoiser.blocks()


def gradients(loop, precision):
    """Output and gradients of the tiny denoiser, with dropout, from noise in place of its zero layers."""
    noise = torch.Generator().manual_seed(0)
    denoiser = get(f"{NAME} --system.denoiser.dropout 0.2").system.denoiser.build().train()
    for p in denoiser.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=noise)
    x, text = torch.randn(1, 4, 6, 4, 4, generator=noise), torch.randn(1, 24, 64, generator=noise)
    checkpoint_blocks(Alone(denoiser), loop)
    torch.manual_seed(1)
    with autocast(precision, torch.device("cpu")):
        y = denoiser(x, torch.tensor([7]), text)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in denoiser.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_bit_equal_whatever_is_computed_again(precision):
    plain = gradients(Loop(max_steps=1), precision)
    assert min(g.abs().max() for g in plain) > 0
    for name, some in SOME.items():
        found = gradients(Loop(max_steps=1, activation_checkpointing=True, **some), precision)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), name


def test_the_plan_counts_what_is_kept_as_well():
    def kept(*flags):
        recipe = get(" ".join((NAME, "--loop.mfu False", *flags)))
        with torch.device("meta"):
            return activation_bytes(recipe, recipe.system.build())

    on = "--loop.activation-checkpointing True"
    least, second, plain = kept(on), kept(on, "--loop.recompute-every 2"), kept()
    attention, products = (kept(on, f"--loop.recompute-keep {name}") for name in ("attention", "products"))
    assert least < second < plain and least < attention < products < plain


def test_what_is_recomputed_is_said_only_where_something_is():
    with pytest.raises(UserError, match=r"Loop.recompute_every = 2: says what activation_checkpointing recomputes"):
        Loop(max_steps=1, recompute_every=2)
    with pytest.raises(UserError, match="recompute_every = 0: must be positive"):
        Loop(max_steps=1, activation_checkpointing=True, recompute_every=0)
