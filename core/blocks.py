"""What is done to the blocks of a network before it trains: activation checkpointing, of all or of some, and
compilation. Names of parameters do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from core.slots import Loop
from core.systems import System

aten = torch.ops.aten
OPERATORS: dict[str, list[Any]] = {
    "products": [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default],
    "attention": [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ],
    "convolutions": [aten.convolution.default],
}
"""What `loop.recompute_keep` names: torch's own operators. Kernels of other libraries are computed again."""
VARIANTS = 8
"""Graphs that a block may be compiled to. One for training and one without gradients, each for one shape and then for
any shape, make four; what is beyond the limit runs uncompiled.
"""

Contexts = Callable[[], Any]


def prepare_blocks(system: System, loop: Loop) -> None:
    """Activation checkpointing, then compilation."""
    checkpoint_blocks(system, loop)
    if loop.compile:
        compile_blocks(system.blocks())


def checkpointed(system: System, loop: Loop) -> list[nn.Module]:
    """The blocks that are computed again in the backward pass."""
    return system.blocks()[:: loop.recompute_every] if loop.activation_checkpointing else []


def checkpoint_blocks(system: System, loop: Loop, contexts: Contexts | None = None) -> None:
    """Let blocks keep their input alone, and of what they compute `loop.recompute_keep`. `contexts` stands in for the
    choice of operators.
    """
    kept = [operator for name in loop.recompute_keep for operator in OPERATORS[name]]
    if contexts is None and kept:
        contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    chosen = {"context_fn": contexts} if contexts else {}
    for block in checkpointed(system, loop):
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, **chosen)  # type: ignore[method-assign]


def compile_blocks(blocks: Sequence[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block by itself, to at most `VARIANTS` graphs: its shapes are its own, not those of the others.

    Its forward alone: the hooks of `fully_shard` around it would break the graph before checkpointing begins.
    """
    from torch._dynamo import config

    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, VARIANTS * len(blocks))
    for block in blocks:
        block.forward = torch.compile(  # type: ignore[call-overload, method-assign]
            block.forward, backend=backend, recompile_limit=VARIANTS, isolate_recompiles=True
        )
