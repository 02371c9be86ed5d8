"""What each of two gloo processes does for test_compile: sharded, checkpointed and compiled against none of it."""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters

from core.blocks import checkpoint_blocks, compile_blocks
from core.distributed import full, ranks, spread
from core.slots import Loop, Parallel


class Block(nn.Module):
    """A residual block of a convolution and a product."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm, self.linear = (
            nn.Conv1d(width, width, 3, padding=1),
            nn.LayerNorm(width),
            nn.Linear(width, width),
        )

    def forward(self, x):
        h = self.norm(torch.nn.functional.silu(self.conv(x)).transpose(1, 2))
        return x + self.linear(h).transpose(1, 2)  # (B, width, N)


class Net(nn.Module):
    """Blocks of several widths, as in a UNet: shapes differ from block to block."""

    def __init__(self, widths=(8, 16, 24)):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in widths)
        self.between = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip((4, *widths), widths, strict=False))

    def forward(self, x):
        for between, block in zip(self.between, self.blocks, strict=True):
            x = block(between(x))
        return x


class Alone:
    """A network as a system."""

    def __init__(self):
        torch.manual_seed(0)
        self.trained, self.frozen = nn.ModuleDict({"net": Net()}), nn.ModuleDict()

    def blocks(self):
        return list(self.trained["net"].blocks)


def gradients(system):
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    system.trained["net"](x).square().mean().backward()
    return {name: full(p.grad) for name, p in system.trained.named_parameters()}


def main(rank: int, port: int, out: Path) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(1)
    with ranks(Parallel(shard=2), "cpu", 100.0) as found:
        expected, system = gradients(Alone()), Alone()
        loop = Loop(max_steps=1, activation_checkpointing=True, recompute_keep=("products",), recompute_every=2)
        checkpoint_blocks(system, loop)
        compile_blocks(system.blocks(), "aot_eager")
        spread(system, Parallel(shard=2), found)
        got = gradients(system)
        torch.save([expected, got, counters["stats"]["unique_graphs"]], out / f"{rank}.pt")
    sys.exit(0)
