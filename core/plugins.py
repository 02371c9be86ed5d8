"""Recipes of other packages: each entry of a group names a module, and importing it registers its recipes."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from core.errors import UserError

GROUP = "video_registry.recipes"


def load_plugins(known: dict[str, Any]) -> None:
    """Import the recipes of installed packages into `known`."""
    for entry in entry_points(group=GROUP):
        _load(entry, known)


def _load(entry: EntryPoint, known: dict[str, Any]) -> None:
    """Import one package's recipes. One that fails is left out with a warning; a name that is taken is an error."""
    package = entry.dist.name if entry.dist else entry.module
    before = dict(known)
    try:
        importlib.import_module(entry.module)
    except (Exception, SystemExit) as error:  # a package that is not ours can raise anything
        if str(error).startswith(("two recipes are called", "two slot classes are called")):
            raise UserError(f"package {package!r}: {error}") from error
        for name in known.keys() - before.keys():
            del known[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        left_out = f"warning: the recipes of package {package!r} are left out"
        print(f"{left_out}: {entry.module} fails with {reason}", file=sys.stderr)


def line_of(error: BaseException) -> str:
    """`recipes/lvdm.py line 12: `, the last line of a recipe file that was being run."""
    import traceback  # 3 ms that `list` need not pay

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "recipes" in f.filename]
    return f"{os.path.relpath(frames[-1].filename)} line {frames[-1].lineno}: " if frames else ""
