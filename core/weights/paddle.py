"""Reads Paddle's `.pdparams` without Paddle: arrays and plain containers; anything else in the file is refused by name.

The file is a pickle of a dict from name to numpy array. What differs between versions of Paddle, all of it read here:

- protocol 4 holds bytes, protocol 2 latin-1 text that is to be encoded; numpy 1 and 2 name their modules differently;
- a value is an array, or a pair (name of the tensor, array);
- up to protocol 3 an array of 2^30 bytes and more is cut into flat slices `<name>@@.<i>`, which the entry
  `UnpackBigParamInfor@@` puts together again;
- bfloat16 is stored as its bits in uint16 (numpy has no such type).

Paddle keeps the matrix of a linear layer as (in, out), torch as (out, in). Many are square, so shapes do not tell: the
type of the layer does (`in_torch_layout`).
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.errors import UserError
from core.weights.lazy import Lazy
from core.weights.pickled import BROKEN, Buffer, Made, Malformed, Name, Raw, leaves, read_pickle

SLICES = "UnpackBigParamInfor@@"
"""How arrays that were cut go together."""

NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
RECONSTRUCT = {Name(module, "_reconstruct") for module in NUMPY}
FROMBUFFER = {Name(module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")}
ENCODE = Name("_codecs", "encode")
DTYPE = Name("numpy", "dtype")
ALLOWED = {
    *RECONSTRUCT,
    *FROMBUFFER,
    *(Name(module, "scalar") for module in NUMPY),
    Name("numpy", "ndarray"),
    DTYPE,
    ENCODE,
    Name("collections", "OrderedDict"),
    *(Name("builtins", name) for name in ("tuple", "bytes", "set", "frozenset")),
}
KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "b1"}
MAX_DIMENSIONS = 32
"""numpy's own limit was this for long."""


def read_pdparams(path: Path) -> dict[str, Lazy]:
    """The tensors of a `.pdparams` file by name, as Paddle holds them (see `in_torch_layout`). Other values are left
    out.

    Raises UserError for a file that is damaged, or that names anything but arrays and plain containers.
    """
    buffer = _mapped(path)
    try:
        content = read_pickle(buffer, functools.partial(_admit, path))
        return _tensors(content, buffer)
    except (Malformed, *BROKEN) as error:
        raise UserError(f"{path}: cannot be read as a .pdparams file ({str(error) or type(error).__name__})") from None


def paddle_state(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a `.pdparams` file in torch's layout, for the layers of `module`."""
    return {name: entry.read() for name, entry in in_torch_layout(read_pdparams(path), matrices(module)).items()}


def matrices(module: nn.Module) -> set[str]:
    """Names of the weights of a module's linear layers, which Paddle holds transposed."""
    return {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def in_torch_layout(state: Mapping[str, Lazy], linear: Collection[str]) -> dict[str, Lazy]:
    """The tensors with the weights named in `linear` transposed; convolutions, embeddings and the rest are alike."""
    return {
        name: entry.transposed() if name in linear and len(entry.shape) == 2 else entry for name, entry in state.items()
    }


def _mapped(path: Path) -> Buffer:
    if path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _admit(path: Path, name: Name) -> None:
    if name not in ALLOWED:
        raise UserError(
            f"{path}: refused, it asks for {name}; a .pdparams file may hold arrays and plain containers only"
        )


def _tensors(content: Any, buffer: Buffer) -> dict[str, Lazy]:
    """Arrays of a dict and of the dicts in it, with dotted names."""
    if not isinstance(content, dict):
        raise Malformed(f"it holds no dict of arrays but a {type(content).__name__}")
    found = {name: _lazy_array(array, buffer) for name, array in leaves(content, _array_in)}
    return _joined(found, content.get(SLICES, {}))


def _array_in(value: Any) -> Made | None:
    """The array that a value is, or that stands beside its name in a pair."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    return value if isinstance(value, Made) and value.what in RECONSTRUCT | FROMBUFFER else None


def _lazy_array(array: Made, buffer: Buffer) -> Lazy:
    if array.what in RECONSTRUCT:
        _version, shape, dtype, fortran, values = array.state
        order = "F" if fortran else "C"
    else:
        values, dtype, shape, order = array.args
    kind = _dtype(dtype)
    if len(shape) > MAX_DIMENSIONS or not all(isinstance(n, int) and n >= 0 for n in shape) or order not in ("C", "F"):
        raise Malformed(f"an array of shape {shape}")
    if _length(values) != math.prod(shape) * kind.itemsize:
        raise Malformed(f"an array of shape {shape} with {_length(values)} bytes")
    read = functools.partial(_read, buffer, values, kind, tuple(shape), order)
    return Lazy(tuple(shape), _torch_dtype(kind), read)


def _dtype(made: Any) -> np.dtype:
    kind = made.args[0] if isinstance(made, Made) and made.what == DTYPE else None
    if kind not in KINDS:
        raise Malformed(f"an array of {kind!r}")
    big = made.state is not None and made.state[1] == ">"
    return np.dtype(kind).newbyteorder(">" if big else "<")


def _torch_dtype(kind: np.dtype) -> torch.dtype:
    if kind.str[1:] == "u2":
        return torch.bfloat16
    return torch.from_numpy(np.empty(0, kind.newbyteorder("="))).dtype


def _length(values: Any) -> int:
    """Bytes of an array's values: where they are in the file, as they are, or as text that is to be encoded."""
    if isinstance(values, Raw):
        return values.stop - values.start
    if isinstance(values, Made):
        return len(_text(values))
    return len(values)


def _text(made: Made) -> str:
    if made.what == Name("builtins", "bytes") and made.args == ():
        return ""
    if made.what != ENCODE or not isinstance(made.args[0], str) or made.args[1:] not in (("latin1",), ("latin-1",)):
        raise Malformed("the values of an array are no bytes")
    return str(made.args[0])


def _read(buffer: Buffer, values: Any, kind: np.dtype, shape: tuple[int, ...], order: Any) -> Tensor:
    """An array as a tensor that owns its memory: one copy, of this array alone."""
    if isinstance(values, Raw):
        values = memoryview(buffer)[values.start : values.stop]
    elif isinstance(values, (Made, str)):
        values = (_text(values) if isinstance(values, Made) else values).encode("latin-1")
    native = np.array(np.frombuffer(values, kind), dtype=kind.newbyteorder("="))
    if kind.str[1:] == "u2":
        flat = torch.from_numpy(native.view(np.int16)).view(torch.bfloat16)
    else:
        flat = torch.from_numpy(native)
    return flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1])


def _joined(found: dict[str, Lazy], slices: Any) -> dict[str, Lazy]:
    """Arrays that were cut, whole again under their own names."""
    for name, plan in slices.items():
        parts = [found.pop(part) for part in plan["slices"]]
        shape = tuple(plan["OriginShape"])
        if not parts or sum(part.numel for part in parts) != math.prod(shape):
            raise Malformed(f"the slices of {name} do not make up its shape {shape}")
        found[name] = Lazy(shape, parts[0].dtype, functools.partial(_concatenated, parts, shape))
    return found


def _concatenated(parts: list[Lazy], shape: tuple[int, ...]) -> Tensor:
    whole = torch.empty(math.prod(shape), dtype=parts[0].dtype)
    start = 0
    for part in parts:
        whole[start : start + part.numel] = part.read().flatten()
        start += part.numel
    return whole.reshape(shape)
