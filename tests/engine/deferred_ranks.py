"""What each of two gloo processes does for test_deferred: shard modules that were never whole, fill them, report."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.deferred import recording
from core.distributed import full, local, ranks, spread
from core.fresh import Fresh
from core.slots import Parallel
from registry import get

SEED = 11
CPU = torch.device("cpu")


class Live(TorchDispatchMode):
    """The largest number of bytes alive at a time among what operations make."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class Tied(nn.Module):
    """An odd number of rows, a tie, a buffer that no state dict has, and layers enough for a peak to show."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(301, 64, padding_idx=0)
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(24)))
        self.head = nn.Linear(64, 301)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(8.0).outer(torch.tensor([1.0, 0.5])).sin(), persistent=False)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens))) + self.angles.sum()


def whole():
    """What one process has: the twin's trained networks and `Tied`, by name."""
    with recording() as tape:
        system, tied = get("lvdm-short-sky-tiny").system.build(), Tied()
    modules = nn.ModuleDict({**system.trained, "tied": tied})
    Fresh(tape, modules).fill(modules, SEED, CPU)
    return modules


def _report(module, peak):
    parts = [local(t) for t in module.parameters()]
    sizes = [t.numel() * t.element_size() for t in module.parameters()]
    kept = sum(t.untyped_storage().nbytes() for t in parts)
    return {"peak": peak, "kept": kept, "largest": max(sizes), "all": sum(sizes)}


def main(out: Path) -> None:
    with ranks(Parallel(shard=2), "cpu", timeout=60.0) as here:
        with recording() as tape:
            system, tied, emptied = get("lvdm-short-sky-tiny").system.build(), Tied(), Tied()
        fresh = Fresh(tape, system.trained, nn.ModuleDict({"tied": tied}))
        again = Fresh(tape, nn.ModuleDict({"tied": emptied}))
        spread(system, Parallel(shard=2), here)
        for module in (tied, emptied):
            fully_shard(module, mesh=here.mesh["replicate", "shard"])
        emptied.to_empty(device=CPU)
        report = {}
        for name, module, source in (("unet", system.trained["unet"], fresh), ("tied", tied, fresh)):
            with Live() as live:
                source.fill(module, SEED, CPU, prefix=f"{name}.")
            report[name] = _report(module, live.peak)
        again.fill(emptied, SEED, CPU, prefix="tied.")
        ties = [m.head.weight is m.embed.weight for m in (tied, emptied)]
        tokens = torch.arange(5)[None]
        outputs = [full(m(tokens)).detach() for m in (tied, emptied)]
        values = {f"unet.{k}": full(v) for k, v in system.trained["unet"].state_dict().items()}
        values |= {f"tied.{k}": full(v).clone() for k, v in [*tied.named_parameters(), *tied.named_buffers()]}
        values |= {f"emptied.{k}": full(v).clone() for k, v in [*emptied.named_parameters(), *emptied.named_buffers()]}
        torch.save({"values": values, "outputs": outputs}, out / f"rank{here.rank}.pt")
        (out / f"rank{here.rank}.json").write_text(json.dumps(report | {"ties": ties}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
