"""A pickle machine that calls nothing: what a file says becomes plain values and inert records, never code.

Checkpoints of Paddle and torch are pickles, and unpickling runs whatever a file asks for. Here a pickle is data:
`pickletools` (standard library) splits it into opcodes, plain containers and numbers are built, a name of a class or
function stays a `Name`, and the call of it stays a `Made`. Long byte strings stay in the file (`Raw`). Memory follows
the size of the file: nothing is allocated because a file claims a length, and the number of opcodes is limited.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

MAX_WORK = 2_000_000
"""Opcodes. A tensor of a checkpoint takes about 30; one opcode makes at most an empty set, 216 bytes."""
LONG = 4096
"""Byte strings of more bytes are left in the file."""
PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}

MAX_LEAVES = 500_000
"""Tensors of a file. Dicts may stand within one another many times over, so a small file can hold more than memory."""
MAX_DEPTH = 4
"""Dicts within dicts that are searched for tensors."""

Buffer = bytes | mmap.mmap


class Name(NamedTuple):
    """A class or function that a pickle names. It is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Raw(NamedTuple):
    """Bytes that stay in the file: the first, and one past the last."""

    start: int
    stop: int


@dataclass(eq=False)
class Made:
    """An object that the pickle wants made: `what` called with `args`, then given `state` and items. Nothing was."""

    what: Any
    args: Any = ()
    state: Any = None
    items: dict[Any, Any] | None = None


TUPLE, ORDERED = Name("builtins", "tuple"), Name("collections", "OrderedDict")


class Malformed(ValueError):
    """This is no pickle, or a damaged one."""


BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, EOFError, struct.error)
"""What reading a damaged pickle raises."""

EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING"}
BYTES = {"SHORT_BINBYTES": 2, "SHORT_BINSTRING": 2, "BINBYTES": 5, "BINSTRING": 5, "BINBYTES8": 9, "BYTEARRAY8": 9}
"""Opcodes that hold bytes, and how many bytes stand before them."""
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STORE = {"PUT", "BINPUT", "LONG_BINPUT"}
FETCH = {"GET", "BINGET", "LONG_BINGET"}
IGNORED = {"PROTO", "FRAME", "STOP"}


def read_pickle(source: Buffer | BytesIO, admit: Callable[[Name], None]) -> Any:
    """What the first pickle in `source` holds. `admit` is asked for every name and raises for one that must not be.

    Raises Malformed for anything that is no whole pickle.
    """
    machine = _Machine(admit)
    try:
        for opcode, argument, position in _opcodes(source):
            machine.spend(1)
            machine.do(opcode.name, argument, position)
        return machine.stack.pop()
    except BROKEN as error:
        raise error if isinstance(error, Malformed) else Malformed(f"{type(error).__name__}: {error}") from None


def _opcodes(source: Any) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    """Opcode, argument, position; of any file-like source (what the type hints of pickletools leave out)."""
    yield from pickletools.genops(source)  # type: ignore[misc]


class _Machine:
    """The stack, the marks on it, and the memo."""

    def __init__(self, admit: Callable[[Name], None]) -> None:
        self.admit = admit
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.work = 0

    def spend(self, work: int) -> None:
        """Count work, so that a small file cannot ask for much."""
        self.work += work
        if self.work > MAX_WORK:
            raise Malformed(f"more than {MAX_WORK:,} opcodes")

    def do(self, code: str, argument: Any, position: int) -> None:
        """One opcode."""
        push = self.stack.append
        if code in NUMBERS or code in TEXTS:
            push(argument)
        elif code in BYTES:
            push(_bytes(argument, position + BYTES[code]))
        elif code in CONSTANTS:
            push(CONSTANTS[code])
        elif code in EMPTY:
            push(EMPTY[code]())
        elif code in TUPLES:
            items = self.stack[-TUPLES[code] :]
            if len(items) < TUPLES[code]:
                raise Malformed("too little on the stack")
            self.stack[-TUPLES[code] :] = [tuple(items)]
        elif code in STORE:
            self.memo[int(argument)] = self.stack[-1]
        elif code in FETCH:
            push(self.memo[int(argument)])
        elif code not in IGNORED:
            step = getattr(self, f"_{code.lower()}", None)
            if step is None:
                raise Malformed(f"opcode {code} is not read here")
            step(argument)

    # ------------------------------------------------------------------------------------------------ stack and memo

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _items(self) -> list[Any]:
        """What stands above the last mark; the mark goes, and `self.stack` is the one below it."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _pop_mark(self, _: Any) -> None:
        self._items()

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # ---------------------------------------------------------------------------------------------------- containers

    def _tuple(self, _: Any) -> None:
        made = tuple(self._items())
        self.stack.append(made)

    def _list(self, _: Any) -> None:
        made = self._items()
        self.stack.append(made)

    def _dict(self, _: Any) -> None:
        items = self._items()
        self.stack.append({})
        self._fill(items)

    def _append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._items())

    def _extend(self, items: list[Any]) -> None:
        """Lists grow; of what a foreign list-like object holds nothing is kept."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Made):
            raise Malformed("an append to something that is no list")

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _setitems(self, _: Any) -> None:
        self._fill(self._items())

    def _fill(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.items = target.items or {}
            target = target.items
        if not isinstance(target, dict):
            raise Malformed("an item of something that is no dict")
        target.update(zip(map(_key, pairs[::2]), pairs[1::2], strict=True))

    def _additems(self, _: Any) -> None:
        items = self._items()
        if not isinstance(self.stack[-1], set):
            raise Malformed("an item of something that is no set")
        self.stack[-1].update(map(_key, items))

    def _frozenset(self, _: Any) -> None:
        made = frozenset(map(_key, self._items()))
        self.stack.append(made)

    # ------------------------------------------------------------------------------------- names, calls, persistent ids

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Malformed("a name that is no text")
        found = Name(PYTHON2.get(module, module), name)
        self.admit(found)
        self.stack.append(found)

    def _reduce(self, _: Any) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        self._call(what, args)

    _newobj = _reduce

    def _call(self, what: Any, args: Any) -> None:
        """The call as a record; plain containers, whose making runs no code, as themselves."""
        if what == TUPLE and len(args) == 1:
            self.stack.append(args[0])
        elif what == ORDERED and isinstance(args, tuple):
            self.stack.append({})
            for key, value in args[0] if args else ():  # Python 2 wrote the pairs here
                self.spend(1)
                self._fill([key, value])
        else:
            self.stack.append(Made(what, args))

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()  # keywords
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        args = self._items()
        self._global(argument)
        self._call(self.stack.pop(), tuple(args))

    def _obj(self, _: Any) -> None:
        what, *args = self._items()
        self._call(what, tuple(args))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def _binpersid(self, _: Any) -> None:
        self.stack.append(Made("persistent", self.stack.pop()))

    def _persid(self, argument: str) -> None:
        self.stack.append(Made("persistent", argument))


def _bytes(argument: Any, start: int) -> bytes | str | Raw:
    """Short byte strings as they are; the long ones' place."""
    return argument if len(argument) <= LONG else Raw(start, start + len(argument))


def _key(key: Any) -> Any:
    """A key of a dict. Hashing tuples within tuples recurses without a limit, so only flat ones may be keys."""
    if isinstance(key, tuple) and not isinstance(key, (Name, Raw)) and any(isinstance(part, tuple) for part in key):
        raise Malformed("a tuple within a tuple as a key")
    return key


def leaves(content: Mapping[Any, Any], pick: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    """What `pick` makes of the values of a dict and of the dicts in it, by dotted name; None is left out.

    Raises Malformed where there are more than any checkpoint has.
    """
    visited = 0
    waiting = [("", content, 1)]
    while waiting:
        prefix, here, depth = waiting.pop()
        for key, value in here.items():
            visited += 1
            if visited > MAX_LEAVES:
                raise Malformed(f"more than {MAX_LEAVES:,} entries")
            if isinstance(value, Mapping):
                if depth < MAX_DEPTH:
                    waiting.append((f"{prefix}{key}.", value, depth + 1))
            elif (found := pick(value)) is not None:
                yield f"{prefix}{key}", found
