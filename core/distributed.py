"""Ranks: where this process stands, what they agree on, and how the trained modules are spread over them (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from core.errors import UserError

if TYPE_CHECKING:
    from core.slots import Parallel
    from core.systems import System


class Ranks:
    """This process among the others. With one process there is no mesh, no wrapping and no communication."""

    def __init__(self, device: torch.device, rank: int, world: int, mesh: DeviceMesh | None) -> None:
        self.device, self.rank, self.world, self.mesh = device, rank, world, mesh

    @property
    def first(self) -> bool:
        """Rank 0: the only one that talks to MLflow and the terminal."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
            values /= self.world
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every rank's tensor (equal shapes), in order of rank, on every rank."""
        if self.mesh is None:
            return [value]
        out = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(out, value.contiguous())
        return out

    def barrier(self) -> None:
        """Wait for everyone."""
        if self.mesh is not None:
            dist.barrier()


def choose_device(wanted: str) -> torch.device:
    """The device of this process. Raises UserError when CUDA is asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("--device cuda: torch sees no CUDA device here; leave it out, or take --device cpu")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def ranks(parallel: Parallel, device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, if any, and leave it at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    replicate, shard = parallel.mesh(world)
    here = choose_device(device)
    if world == 1:
        yield Ranks(here, 0, 1, None)
        return
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        mesh = init_device_mesh(here.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        yield Ranks(here, dist.get_rank(), world, mesh)
    finally:
        dist.destroy_process_group()


def spread(system: System, mesh: DeviceMesh | None) -> None:
    """Put the trained modules on the mesh, block by block, root last. Without a mesh they stay plain modules."""
    if mesh is None:
        return
    for block in system.blocks():
        fully_shard(block, mesh=mesh)
    for module in system.trained.values():
        fully_shard(module, mesh=mesh)


def synchronise_gradients(modules: nn.ModuleDict, on: bool) -> None:
    """Switch the reduction of gradients for the next backward pass (off between micro-batches of one update)."""
    for module in modules.values():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank (a collective for a DTensor)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
