"""Modules built without their weights, and the weights made later, one tensor at a time.

`with recording() as tape:` every tensor of a constructor is a meta tensor, and each operation that makes or changes one
is written on a tape. `Fresh(tape, module)` then knows how each parameter and buffer comes about, and replays just that:
no rank ever holds a model that it will keep a shard of, weights that a checkpoint brings are never drawn, and the
values of a parameter depend on (seed, its name) alone: not on other layers, nor on the number of ranks.

`with torch.device("meta")` would not do. torch and transformers leave out what they would do to a meta tensor
(`nn.init.trunc_normal_`, `orthogonal_`, `dirac_`, `sparse_`; `PreTrainedModel.init_weights`; DETR's copied norms), and
`torch.tensor(data)` forgets the data. So a constructor is told that its tensors are on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from core.errors import UserError

META, CPU = torch.device("meta"), torch.device("cpu")
Memory = dict[int, UntypedStorage]
"""Real storages by their number on the tape."""
aten = torch.ops.aten
LIFT = (aten.lift_fresh.default, aten.lift.default)
OVERWRITES = (
    aten.normal_.default,
    aten.uniform_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
    aten.copy_.default,
)
"""Operations that leave nothing of what the tensor held: what came before need not be replayed."""
TRUNC_NORMAL = torch.nn.init._no_grad_trunc_normal_
PRETENDED = {Tensor.device: CPU, Tensor.is_meta: False, Tensor.is_cpu: True}  # type: ignore[dict-item]
"""What a recorded tensor says of itself."""
LOOKS = (Tensor.numpy, Tensor.__array__, Tensor.tolist)
UNSET = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
"""Operations whose result is whatever the memory held."""


@dataclass(frozen=True)
class Region:
    """Where a meta tensor lies: the number of its storage on the tape, and its geometry there."""

    storage: int
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    def on(self, storage: UntypedStorage) -> Tensor:
        """The tensor on a real storage."""
        tensor = torch.empty(0, dtype=self.dtype, device=CPU).set_(storage, self.offset, self.size, self.stride)  # type: ignore[call-overload]
        tensor = torch._conj(tensor) if self.conj else tensor
        return torch._neg_view(tensor) if self.neg else tensor

    @property
    def whole(self) -> bool:
        """Whether the tensor is all of its storage, each element once."""
        elements, expected = 1, []
        for size in reversed(self.size):
            expected.append(elements)
            elements *= size
        return self.stride == tuple(reversed(expected)) and elements * self.dtype.itemsize == self.nbytes


@dataclass(frozen=True)
class Op:
    """One operation on the tape, its tensors replaced by regions (real ones by copies)."""

    func: Any
    leaves: list[Any]
    spec: TreeSpec | None
    results: list[Region]
    reads: frozenset[int]
    writes: frozenset[int]
    overwrites: bool = False
    random: bool = False
    trouble: str = ""
    """Why it cannot be replayed."""
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)

    @property
    def name(self) -> str:
        return "nn.init.trunc_normal_" if self.func is TRUNC_NORMAL else str(self.func)

    @property
    def unset(self) -> bool:
        return self.name.removeprefix("aten.").partition(".")[0] in UNSET


class Tape:
    """What `recording` wrote: operations in order, and who wrote which storage when."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._numbers: dict[int, int] = {}
        self._held: list[UntypedStorage] = []  # a freed storage's address would be given to another
        self._writers: list[list[int]] = []

    def region(self, tensor: Tensor) -> Region:
        """Where `tensor` lies. A storage that no operation made gets an entry that says so."""
        known = len(self._held)
        region = self._region(tensor)
        if region.storage == known:
            outside = "it was made outside of the recording, or from data given to the meta device"
            self._add(Op("a tensor", [], None, [region], frozenset(), frozenset([region.storage]), trouble=outside))
        return region

    def _region(self, tensor: Tensor) -> Region:
        if tensor.layout is not torch.strided:
            raise UserError(f"a {tensor.layout} tensor in a constructor cannot be recorded {_where()}")
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._held)
            self._held.append(storage)
            self._writers.append([])
        geometry = tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset())
        return Region(number, storage.nbytes(), tensor.dtype, *geometry, tensor.is_conj(), tensor.is_neg())

    def _add(self, op: Op) -> None:
        for storage in op.writes:
            self._writers[storage].append(len(self.ops))
        self.ops.append(op)

    def record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on meta tensors, and write it down unless its result is a view."""
        leaves, spec = tree_flatten((args, kwargs))
        kept = [self._kept(leaf) for leaf in leaves]
        written = [self.region(t) for t in _written(func, args, kwargs)]
        args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        out = func(*args, **kwargs)
        results = [self._region(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        inputs = {leaf.storage for leaf in kept if isinstance(leaf, Region)}
        writes = {r.storage for r in written} | {r.storage for r in results} - inputs
        if not writes:
            return out
        overwrites = func in OVERWRITES and written[0].whole
        sources = {leaf.storage for leaf in kept[1:] if isinstance(leaf, Region)} if overwrites else inputs
        trouble = _own_generator(leaves)
        random = torch.Tag.nondeterministic_seeded in func.tags
        self._add(Op(func, kept, spec, results, frozenset(sources), frozenset(writes), overwrites, random, trouble))
        return out

    def trunc_normal(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`nn.init.trunc_normal_` as one operation: it draws again until nothing is outside, a loop over values."""
        with torch._C.DisableTorchFunction():
            if not tensor.is_meta:
                return TRUNC_NORMAL(tensor, *args, **kwargs)
            region = self.region(tensor)
        leaves, spec = tree_flatten(((region, *args), kwargs))
        storage: frozenset[int] = frozenset([region.storage])
        reads = storage - storage if region.whole else storage
        self._add(Op(TRUNC_NORMAL, leaves, spec, [region], reads, storage, region.whole, True, _own_generator(leaves)))
        return tensor

    def _kept(self, leaf: Any) -> Any:
        """An argument as the tape keeps it. A real tensor may change later, so a copy of it."""
        if isinstance(leaf, Tensor):
            return self.region(leaf) if leaf.is_meta else leaf.detach().clone()
        return CPU if leaf == META else leaf

    def needed(self, storage: int) -> list[int]:
        """The operations, in order, that the last state of a storage depends on."""
        found: set[int] = set()
        waiting = [(storage, len(self.ops))]
        while waiting:
            wanted, before = waiting.pop()
            for index in reversed(self._writers[wanted]):
                if index >= before:
                    continue
                if index not in found:
                    found.add(index)
                    waiting += [(read, index) for read in self.ops[index].reads]
                if self.ops[index].overwrites:
                    break
        return sorted(found)

    def play(self, indices: Sequence[int], wanted: Collection[int], seeds: Mapping[int, int]) -> Memory:
        """Carry out operations on real memory, each draw with its seed, and return the storages that are wanted. What
        is no longer needed is freed at once; the caller's random state stays as it is.
        """
        last = {s: i for i in indices for s in self.ops[i].reads | self.ops[i].writes}
        memory: Memory = {}
        usual = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                for index in indices:
                    if index in seeds:
                        torch.default_generator.manual_seed(seeds[index])  # torch.manual_seed would seed GPUs too
                    self._play(self.ops[index], memory)
                    for done in [s for s in memory if last[s] == index and s not in wanted]:
                        del memory[done]
            finally:
                torch.set_default_dtype(usual)
        return memory

    def _play(self, op: Op, memory: Memory) -> None:
        assert op.spec is not None
        torch.set_default_dtype(op.dtype)
        leaves = [_on(leaf, memory) if isinstance(leaf, Region) else leaf for leaf in op.leaves]
        args, kwargs = tree_unflatten(leaves, op.spec)
        made = [t for t in tree_leaves(op.func(*args, **kwargs)) if isinstance(t, Tensor)]
        for region, tensor in zip(op.results, made, strict=True):
            if region.storage in memory:
                continue
            if op.unset:
                tensor.zero_()  # the same on every rank, whatever is left unwritten
            if _alike(region, tensor):
                memory[region.storage] = tensor.untyped_storage()
            else:
                _on(region, memory).copy_(tensor)

    def values(self, tensor: Tensor, asker: str) -> Tensor:
        """The values of a meta tensor while the constructor runs: possible as long as nothing in it is random."""
        region = self.region(tensor)
        indices = self.needed(region.storage)
        for op in (self.ops[i] for i in indices):
            if op.random or op.trouble:
                why = f"{op.name}: {op.trouble}" if op.trouble else f"drawn at random by {op.name}"
                raise UserError(f"{asker} asks for the values of a tensor that has none yet ({why}) {_where()}")
        with _disable_current_modes():
            return region.on(self.play(indices, [region.storage], {})[region.storage])


def _on(region: Region, memory: Memory) -> Tensor:
    """A region on real memory. It is new where the operation is about to overwrite all of it."""
    if region.storage not in memory:
        memory[region.storage] = torch.empty(region.nbytes, dtype=torch.uint8, device=CPU).untyped_storage()
    return region.on(memory[region.storage])


def _alike(region: Region, tensor: Tensor) -> bool:
    """Whether a kernel on the CPU laid its result out as the meta kernel said."""
    here = tuple(tensor.size()), tuple(tensor.stride()), tensor.storage_offset(), tensor.untyped_storage().nbytes()
    return here == (region.size, region.stride, region.offset, region.nbytes)


def _own_generator(leaves: list[Any]) -> str:
    return "it draws from a generator of its own" if any(isinstance(x, torch.Generator) for x in leaves) else ""


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes."""
    changed = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            changed += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return changed


def _where() -> str:
    """The line outside of torch that is being carried out."""
    frame, torch_root = sys._getframe(1), str(Path(torch.__file__).parent)
    while frame.f_back and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torch_root)):
        frame = frame.f_back
    return f"({frame.f_code.co_filename}:{frame.f_lineno})"


class _Recorder(TorchDispatchMode):
    """Sends whatever a constructor makes to the meta device, and to the tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # here a meta tensor is a meta tensor
            return self._run(func, args, dict(kwargs or {}))

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in LIFT:
            return self._lift(args[0])
        if tensors and not any(t.is_meta for t in tensors) and kwargs.get("device") != META:
            return self._real(func, args, kwargs)
        if self._needs_values(func, args, kwargs):
            return func(*self._values(func, args), **self._values(func, kwargs))
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = META
        try:
            return self.tape.record(func, args, kwargs)
        except NotImplementedError as error:  # no meta kernel: the shape depends on the values
            if _written(func, args, kwargs):
                raise UserError(f"{func} cannot be recorded: it knows no meta tensors {_where()}") from error
            kwargs |= {"device": CPU} if "device" in kwargs else {}
            real = func(*self._values(func, args), **self._values(func, kwargs))
            return tree_map_only(Tensor, self._lift, real)

    def _lift(self, tensor: Tensor) -> Tensor:
        """Data from Python or numpy becomes a constant on the tape."""
        return tensor if tensor.is_meta else self.tape.record(aten._to_copy.default, (tensor,), {"device": META})

    def _real(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UserError(f"{func} draws random numbers for a tensor that is not recorded {_where()}")
        return func(*args, **kwargs)

    @staticmethod
    def _needs_values(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the result is no meta tensor: a number, or a real tensor that was asked for or is written to."""
        if func is aten._to_copy.default:
            return (kwargs.get("device") or META) != META
        numbers = not any("Tensor" in str(result.type) for result in func._schema.returns)
        written = _written(func, args, kwargs)
        return (numbers and not written) or any(not t.is_meta for t in written)

    def _values(self, func: Any, tree: Any) -> Any:
        return tree_map_only(Tensor, lambda t: self.tape.values(t, str(func)) if t.is_meta else t, tree)


def _indices(index: Any) -> Any:
    """Lists in an index as tensors: made inside of torch they would be meta tensors without values."""
    if isinstance(index, tuple):
        return tuple(_indices(list(i) if isinstance(i, tuple) else i) for i in index)
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


class _Python(TorchFunctionMode):
    """Tells Python that recorded tensors are on the CPU, and gives it their values where no operation is involved."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
            return func(*args, **kwargs)
        attribute = getattr(func, "__self__", None)
        if attribute in PRETENDED:
            return PRETENDED[attribute]
        if func in LOOKS:
            return func(self.tape.values(args[0], func.__name__), *args[1:], **kwargs)
        if func is Tensor.cpu:
            return args[0]
        if func is Tensor.to:  # where it is already: no copy
            args = [META if isinstance(a, torch.device | str) else a for a in args]
            kwargs |= {"device": META} if kwargs.get("device") is not None else {}
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs | {"device": CPU})
        return func(*args, **kwargs)


@contextmanager
def recording() -> Iterator[Tape]:
    """Build modules inside: their tensors are meta tensors, and the tape knows how to make them.

    Raises UserError when the constructor needs values that are not there yet, or seeds torch's generator itself.
    """
    tape, state = Tape(), torch.get_rng_state()
    torch.nn.init._no_grad_trunc_normal_ = tape.trunc_normal
    try:
        with _Recorder(tape), _Python(tape):
            yield tape
    finally:
        torch.nn.init._no_grad_trunc_normal_ = TRUNC_NORMAL
    if not torch.equal(state, torch.get_rng_state()):
        raise UserError("a constructor seeds torch, or draws from it unseen: its values would not follow loop.seed")
