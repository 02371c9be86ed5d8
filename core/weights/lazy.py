"""Tensors of a file that are read one at a time: a checkpoint larger than memory can be listed, renamed and loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Lazy:
    """A tensor that is somewhere else: shape and dtype are known, `read()` fetches the values (on the CPU)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def transposed(self) -> Lazy:
        """The transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], read=lambda: self.read().T)

    def reshaped(self, *shape: int) -> Lazy:
        """The same values in another shape."""
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))


State = Mapping[str, Lazy]
"""Tensors by name."""


def lazy(tensor: Tensor) -> Lazy:
    """A tensor that is in memory already (or mapped)."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def lazily(tensors: Mapping[str, Tensor]) -> dict[str, Lazy]:
    """The tensors of a state dict."""
    return {name: lazy(tensor) for name, tensor in tensors.items()}


def safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a .safetensors file. Raises SafetensorError for one that is damaged."""
    file = safe_open(path, framework="pt")
    return {name: _entry(file, name) for name in file.keys()}  # noqa: SIM118  it is no dict


def _entry(file: safe_open, name: str) -> Lazy:
    part = file.get_slice(name)
    return Lazy(tuple(part.get_shape()), DTYPES[part.get_dtype()], lambda: file.get_tensor(name))


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Names of safetensors."""
