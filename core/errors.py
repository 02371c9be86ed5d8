"""What a person did wrong, said in one line, and the nearest right thing beside it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the command line prints the message alone, without a traceback, and exits with 2.

    The message says what, where and what to do.
    """


class Screen(UserError):
    """A UserError that needs several lines, because several things are wrong at once; printed as it is."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'lvdm-short-sky'?)"` for a near miss, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.55)
    return f" (did you mean {near[0]!r}?)" if near else ""
