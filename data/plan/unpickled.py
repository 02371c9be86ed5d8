"""Annotations as pickles: plain values alone. An opcode that names, calls or builds anything is refused, not run."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

from core.errors import UserError

MAGIC = (pickle.PROTO, pickle.FRAME, pickle.STOP)
NUMBERS = (
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.FLOAT, pickle.BINFLOAT, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
)
TEXTS = (pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8)
CONTAINERS = (
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.LIST, pickle.MARK),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
)
MEMO = (
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.POP, pickle.POP_MARK, pickle.DUP),
)
BROKEN = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, EOFError)


class _Refused(dict[int, Any]):
    """The table of opcodes: what is not in it is an error that says so."""

    def __missing__(self, code: int) -> Any:
        name = next((n for n in pickle.__all__ if n.isupper() and getattr(pickle, n) == bytes([code])), f"{code:#x}")
        raise pickle.UnpicklingError(f"it holds {name}, which makes objects or calls functions")


class _Plain(pickle._Unpickler):
    """Python's own pickle machine with most of its opcodes taken out. The machine written in C cannot be cut down: it
    also sizes its memo by what a file claims.
    """

    dispatch = _Refused({code[0]: pickle._Unpickler.dispatch[code[0]] for code in MAGIC + NUMBERS + TEXTS + MEMO})

    def load_dict_items(self) -> None:
        """Keys are texts: to hash a deep tuple has no limit."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._fill(items)

    def load_dict_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._fill([key, value])

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]  # type: ignore[attr-defined]
        if type(target) is not dict or not all(type(key) is str for key in items[::2]):
            raise pickle.UnpicklingError("it holds a dict whose keys are not texts")
        target.update(zip(items[::2], items[1::2], strict=True))


_Plain.dispatch.update({code[0]: pickle._Unpickler.dispatch[code[0]] for code in CONTAINERS})
_Plain.dispatch[pickle.SETITEMS[0]] = _Plain.load_dict_items
_Plain.dispatch[pickle.SETITEM[0]] = _Plain.load_dict_item


def unpickled(file: Path) -> Any:
    """What a pickle of lists, dicts, texts and numbers holds. Raises UserError for any other; nothing in it is run."""
    try:
        return _Plain(BytesIO(file.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: no pickle of plain lists, dicts, texts and numbers: {error}. Nothing of it was run; write the "
            "annotations as json, jsonl or parquet."
        ) from None
    except BROKEN as error:
        raise UserError(f"{file}: not a whole pickle ({type(error).__name__}: {error}).") from None
