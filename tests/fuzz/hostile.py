"""What the fuzz tests share: changes of bytes and of JSON, the one rule of every reader, the corpus of inputs that once
failed.

The rule: an input ends in a value, in a counted skip (`BadSample`) or in one line for the person (`UserError`). Any
other exception is a failure, and so is a file that came, went or changed anywhere but in the folder of the input.
"""

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from core.errors import UserError
from data.samples import BadSample

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Inputs a test in a long run (`make soak`), which are others every time; 0: the short run, always the same inputs."""


def bounded(examples: int) -> settings:
    """Of a fuzz test: so many inputs, the same ones everywhere, unless this is a long run."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(call: Callable[[], Any]) -> Any:
    """The value, or the refusal of a reader. Raises what no reader may raise."""
    try:
        return call()
    except BadSample as error:
        assert error.name and error.reason
        return error
    except UserError as error:
        said = str(error)
        assert said.strip() and "\n" not in said and len(said) < 4000, f"no single clear line: {said[:3000]!r}"
        assert said.isprintable(), f"the terminal would obey this: {said!r}"
        return error


def kept(reader: str) -> list[Path]:
    """Inputs of a reader that failed once."""
    return sorted((CORPUS / reader).glob("*"))


@contextmanager
def keeping(reader: str, content: bytes) -> Iterator[None]:
    """Write the input to the corpus when it fails within: the last one written is the smallest that was found."""
    try:
        yield
    except BaseException:
        (CORPUS / reader).mkdir(parents=True, exist_ok=True)
        (CORPUS / reader / "found").write_bytes(content)
        raise


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Within, no file of these folders comes, goes or changes."""
    before = [_state(folder) for folder in folders]
    yield
    assert [_state(folder) for folder in folders] == before


def _state(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        of = path.lstat()
        found[path.relative_to(folder).as_posix()] = (of.st_mode, of.st_size, of.st_mtime_ns)
    return found


# -------------------------------------------------------------------------------------------------- changes of bytes


@st.composite
def changed(draw: st.DrawFn, wholes: list[bytes]) -> bytes:
    """One of the files, with a few changes: cut, bytes replaced, a part repeated or taken out, numbers overwritten."""
    content = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 3))):
        # most of what a reader believes stands at the beginning
        end = draw(st.sampled_from([min(len(content), 64), len(content)]))
        at = draw(st.integers(0, end))
        match draw(st.sampled_from(["cut", "replace", "number", "repeat", "take out"])):
            case "cut":
                del content[at:]
            case "replace":
                content[at : at + 4] = draw(st.binary(min_size=1, max_size=4))
            case "number":
                content[at : at + 4] = struct.pack(draw(st.sampled_from("<>")) + "I", draw(NUMBERS))
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            case "take out":
                del content[at : at + draw(st.integers(1, 64))]
    return bytes(content)


NUMBERS = st.sampled_from([0, 1, 0x7F, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])

# --------------------------------------------------------------------------------------------------- changes of JSON

ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 0.5, -0.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30),
        *("", "x", "../..", "\x1b[2J", "\ud800", "a\nb", "9" * 3000),
        *([], {}, [[]], [0], [0, 0], [None, None], ["a", "b"], [-1, -1], {"a": 1}, {"": None}),
    ]
).map(copy.deepcopy)


@st.composite
def altered(draw: st.DrawFn, whole: Any) -> bytes:
    """A JSON value with some of its parts replaced, removed or added, as text."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        value = _altered(draw, value, draw(st.integers(0, 5)))
    return json.dumps(value).encode()


def _altered(draw: st.DrawFn, value: Any, depth: int) -> Any:
    """One change at most `depth` levels down."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or depth == 0:
        return draw(ODD)
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["into", "into", "replace", "remove", "add"]))
    if how == "into":
        value[key] = _altered(draw, value[key], depth - 1)
    elif how == "replace":
        value[key] = draw(ODD)
    elif how == "remove":
        del value[key]
    elif isinstance(value, dict):
        value[draw(st.sampled_from(["", "x", "is", "\ud800", "__class__", "../x"]))] = draw(ODD)
    else:
        value.append(draw(ODD))
    return value
