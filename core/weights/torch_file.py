"""Reads torch's checkpoints (.ckpt, .pt, .pth, .bin) without running anything that is in them.

`torch.load(weights_only=True)` opens what holds tensors and plain values. Checkpoints of Lightning hold classes besides
(callbacks, OmegaConf), which it refuses. Those are read by the machine of `pickled.py`, for which a class is a name,
and their tensors are taken from the zip archive by place. Names from the standard library that no checkpoint needs
(os.system, builtins.eval) are refused there too: such a file is an attack.
"""

from __future__ import annotations

import functools
import math
import mmap
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.weights.lazy import Lazy, lazy
from core.weights.pickled import BROKEN, Made, Malformed, Name, leaves, read_pickle

LIMIT = 256 * 2**20
"""Bytes of the pickle within an archive; tensors are not in it."""
HARMLESS = {
    *("collections", "argparse", "pathlib", "datetime", "enum", "typing", "decimal", "uuid", "types", "copyreg"),
    "_codecs",
}
"""Modules of the standard library that checkpoints of Lightning name."""
BUILTINS = {
    *("set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "bytearray"),
    "complex",
}
BUILTINS |= {"slice", "range", "object", "type", "NoneType"}
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETERS = {Name("torch._utils", "_rebuild_parameter"), Name("torch._utils", "_rebuild_parameter_with_state")}


def read_torch(path: Path) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors of a checkpoint by dotted name, and the classes in it that were passed over.

    Raises UserError for a file that is damaged, or that asks for what no checkpoint needs.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _refuse_compressed(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol"
            )  # whether it can be read shows at once
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if not zipped:
            raise UserError(
                f"{path}: not opened, a checkpoint may hold tensors and plain values only ({_first_line(error)}); "
                "written by torch < 1.6: save it again with a newer one"
            ) from None
        return _read_inert(path)
    except (RuntimeError, EOFError, OSError, *BROKEN) as error:
        raise UserError(f"{path}: cannot be read as a torch checkpoint ({_first_line(error)})") from None
    if isinstance(content, Tensor):
        content = {"tensor": content}
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no dict of tensors but a {type(content).__name__}")
    return {name: lazy(t) for name, t in leaves(content, _tensor)}, []


def _refuse_compressed(path: Path) -> None:
    """torch writes its archives without compression; one whose parts are larger than itself would fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: not opened, a damaged archive ({error})") from None
    if size > path.stat().st_size:
        raise UserError(f"{path}: not opened, its parts are larger than the file ({size:,} bytes)")


def _tensor(value: Any) -> Tensor | None:
    return value.detach() if isinstance(value, Tensor) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --------------------------------------------------------------------------------------- archives with classes in them


def _read_inert(path: Path) -> tuple[dict[str, Lazy], list[str]]:
    names: set[Name] = set()

    def admit(name: Name) -> None:
        _refuse_attack(path, name)
        names.add(name)

    try:
        with zipfile.ZipFile(path) as archive:
            root, content = _unpickled(archive, admit)
            records = {i.filename.removeprefix(root): i for i in archive.infolist() if i.filename.startswith(root)}
            file = _mapped(path)
            tensors = {name: _lazy_tensor(made, records, file) for name, made in leaves(content, _made_tensor)}
    except (zipfile.BadZipFile, AttributeError, *BROKEN) as error:
        raise UserError(f"{path}: cannot be read as a torch checkpoint ({_first_line(error)})") from None
    return tensors, sorted(str(name) for name in names if not name.module.startswith(("torch", "collections")))


def _refuse_attack(path: Path, name: Name) -> None:
    root = name.module.partition(".")[0]
    if name.name in BUILTINS if root == "builtins" else root not in sys.stdlib_module_names or root in HARMLESS:
        return
    raise UserError(f"{path}: refused, it asks for {name}; a checkpoint may hold tensors and plain values only")


def _unpickled(archive: zipfile.ZipFile, admit: Any) -> tuple[str, Mapping[Any, Any]]:
    """The folder in the archive that everything is in, and what its pickle holds."""
    found = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > LIMIT:
        raise Malformed("the archive has no data.pkl of a sensible size")
    root = found[0].filename.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise Malformed("written on a big-endian machine")
    content = read_pickle(BytesIO(archive.read(found[0])), admit)
    if not isinstance(content, Mapping):
        raise Malformed(f"holds no dict of tensors but a {type(content).__name__}")
    return root, content


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _made_tensor(value: Any) -> Made | None:
    while isinstance(value, Made) and value.what in PARAMETERS:
        value = value.args[0]
    return value if isinstance(value, Made) and value.what == TENSOR else None


def _lazy_tensor(made: Made, records: Mapping[str, zipfile.ZipInfo], file: mmap.mmap) -> Lazy:
    storage, offset, shape, stride, *_ = made.args
    _kind, storage_type, key, _device, _numel = storage.args
    dtype = STORAGES[storage_type.name]
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise Malformed(f"a tensor of shape {shape}")
    record = records[f"data/{key}"]
    if record.compress_type != zipfile.ZIP_STORED:
        raise Malformed(f"data/{key} is compressed")
    start = _start(record, file) + offset * dtype.itemsize
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    stop = start + reach * dtype.itemsize
    if (offset + reach) * dtype.itemsize > record.file_size or stop > len(file):
        raise Malformed(f"a tensor of shape {shape} in {record.file_size} bytes")
    return Lazy(tuple(shape), dtype, functools.partial(_read, file, start, stop, dtype, shape, stride))


def _start(record: zipfile.ZipInfo, file: mmap.mmap) -> int:
    """Where a record's bytes begin: behind its local header, whose two last lengths are variable."""
    at = record.header_offset
    if file[at : at + 4] != b"PK\3\4":
        raise Malformed(f"{record.filename} is not where the archive says")
    name, extra = struct.unpack("<HH", file[at + 26 : at + 30])
    return at + 30 + int(name) + int(extra)


def _read(file: mmap.mmap, start: int, stop: int, dtype: torch.dtype, shape: Any, stride: Any) -> Tensor:
    """One tensor, in memory of its own."""
    flat = torch.empty((stop - start) // dtype.itemsize, dtype=dtype)
    if len(flat):
        flat.view(torch.uint8).numpy()[:] = np.frombuffer(file, np.uint8, stop - start, start)
    return flat.as_strided(shape, stride)
