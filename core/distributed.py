"""Ranks: where this process stands, what they agree on, and how the trained modules are spread over them (FSDP2)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from core.errors import UserError
from core.lost import named_when_lost
from core.precision import DTYPES

if TYPE_CHECKING:
    from core.slots import Parallel
    from core.systems import System


class Ranks:
    """This process among the others. With one process there is no mesh, no wrapping and no communication.

    `data_rank` of `data_world` says whose samples these are: ranks along the mesh's sequence dimension share theirs.
    `background` is a process group for threads beside the main one (checkpoints). A collective that takes longer than
    `timeout` seconds is an error. `store` is where ranks can say something when collectives no longer work.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int,
        world: int,
        mesh: DeviceMesh | None,
        timeout: float = 600.0,
        store: Store | None = None,
    ) -> None:
        self.device, self.rank, self.world, self.mesh = device, rank, world, mesh
        sequence = 1 if mesh is None else mesh["sequence"].size()
        self.data_rank, self.data_world = rank // sequence, world // sequence
        self.timeout, self.store = timeout, store
        self.update = 0
        """The update that is being made, for errors."""
        patience = timedelta(seconds=timeout)
        self.background = None if mesh is None else dist.new_group(backend="gloo", timeout=patience)
        for group in mesh.get_all_groups() if mesh is not None else ():
            dist.set_timeout(patience, group)  # they have torch's default, which for gloo is 30 minutes

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Within: an error of a collective is a UserError that says which ranks did not come, and where."""
        with named_when_lost(self.rank, self.world, self.store, self.timeout, lambda: self.update):
            yield

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

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, over the background group: for threads beside the main one."""
        if self.mesh is None:
            return [value]
        return self._gathered(value, self.background)

    def _gathered(self, value: Any, group: Any) -> list[Any]:
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=group)
        return out

    def everyone(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank."""
        if self.mesh is None:
            return [value]
        return self._gathered(value, None)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every data rank's tensor (equal shapes), in order of rank, on every rank."""
        if self.mesh is None:
            return [value]
        out = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(out, value.contiguous())
        return out[:: self.world // self.data_world]

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
def ranks(parallel: Parallel, device: str, timeout: float) -> Iterator[Ranks]:
    """Join the process group that torchrun describes in the environment, if any, and leave it at the end.

    A collective that takes longer than `timeout` seconds is an error. Raises UserError, which names this rank, when
    another one is gone.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shape = parallel.mesh(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    here = choose_device(device)
    if world == 1:
        yield Ranks(here, 0, 1, None)
        return
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = of_this_start(store)
    # of a forward pass; nothing here changes an output in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    try:
        with named_when_lost(rank, world, store, timeout):
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
            )
            mesh = init_device_mesh(here.type, shape, mesh_dim_names=("replicate", "shard", "sequence"))
            yield Ranks(here, rank, world, mesh, timeout, store)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def of_this_start(store: Store) -> Store:
    """Where torchrun keeps its store over restarts, and with it the addresses of the dead, names of this start's own.

    Raises UserError where they could differ: each machine counts restarts for itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            "torchrun with --max-restarts on several machines: a restart would wait for addresses of the dead; "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each, as the jobs of `python -m registry launch` do"
        )
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def spread(system: System, parallel: Parallel, here: Ranks) -> None:
    """Put the trained modules on the mesh, block by block, root last, and large frozen ones as a whole. Without a mesh
    they stay plain modules.
    """
    if here.mesh is None:
        return
    mesh = here.mesh["replicate", "shard"]
    policy = MixedPrecisionPolicy(DTYPES[parallel.param_dtype], DTYPES[parallel.reduce_dtype])
    offload = CPUOffloadPolicy(pin_memory=here.device.type == "cuda") if parallel.offload else OffloadPolicy()
    for module in (*system.blocks(), *system.trained.values()):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    if here.mesh["shard"].size() == 1:
        return
    for module in system.frozen.values():
        if sum(p.numel() for p in module.parameters()) >= parallel.shard_frozen_from:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            for method in ("encode", "decode"):  # of an autoencoder: they are called, and forward is not
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)


def synchronise_gradients(modules: nn.ModuleDict, on: bool) -> None:
    """Switch the reduction of gradients for the next backward pass (off between micro-batches of one update)."""
    for module in modules.values():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on)


def is_spread(module: nn.Module) -> bool:
    """Whether each call of a module is a collective."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> Tensor:
    """Copy a whole tensor into `target`; of a DTensor each rank takes its part, without communication."""
    if isinstance(target, DTensor):
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)
    return target


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank (a collective for a DTensor)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
