"""What a person did wrong, said in one line, and the nearest right thing beside it."""

import difflib
import sys
import traceback
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the command line prints the message alone, without a traceback, and exits with 2.

    The message says what, where and what to do. It is one line of bounded length that a terminal can show, whatever
    names and values from files stand in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class Screen(UserError):
    """A UserError that needs several lines, because several things are wrong at once; printed as it is."""

    def __str__(self) -> str:
        return Exception.__str__(self)


LONGEST = 2000
"""Characters of a message, at most."""


def printable(text: str) -> str:
    """The text as one line without what a terminal would obey or cannot show; the middle of a very long one is cut."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'lvdm-short-sky'?)"` for a near miss, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.55)
    return f" (did you mean {near[0]!r}?)" if near else ""


def tell(error: UserError, debug: bool) -> None:
    """Say on stderr what went wrong; with `debug` its traceback too."""
    if debug:
        traceback.print_exception(error)
    print("error: " + (str(error) if isinstance(error, Screen) else " ".join(str(error).split())), file=sys.stderr)
