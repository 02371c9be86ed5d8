"""`promote`: what a run trained becomes a recipe of its own, a child class in a file among the recipes."""

from __future__ import annotations

import importlib
import keyword
import re
import sys
from pathlib import Path

from core.cli import parse
from core.errors import UserError
from core.recipe_file import load, read
from core.recipe_source import child_source
from core.slots.recipe import RECIPES, Recipe
from core.slots.slot import Slot
from core.verbs.diff import differences, parent_of
from core.verbs.flags import StoreFlags, taken


def promote(where: str, words: list[str], folder: str) -> int:
    """Write the recipe of a run, called as `--as` says, into the package of recipes at `folder`; prints the file."""
    rest = list(words)
    name = taken(rest, "--as")
    (flags,) = parse(rest, StoreFlags())
    if name is None:
        raise UserError("promote needs the name of the new recipe: --as NAME")
    file = write_child(of_run(where, flags.store), name, where, Path(folder))
    print(f"{file}\nnext: say in its docstring what it is for; python -m tests.golden_recipes; git add")
    return 0


def of_run(where: str, store: str | None) -> Recipe:
    """The recipe of a run, by its output directory or MLflow id."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        return read(folder)
    from core.tracking import fetch_recipe_json

    return load(fetch_recipe_json(where.removeprefix("run:"), store), where)


def write_child(recipe: Recipe, name: str, where: str, folder: Path) -> Path:
    """Write the child of the recipe's registered class as a module of the package at `folder`, import it there, and see
    that it is the recipe. Raises UserError, and leaves all as it was, where one of that cannot be done.
    """
    parent = parent_of(recipe)
    if parent.__module__.partition(".")[0] != "recipes":
        raise UserError(
            f"{parent.name} comes from another package, {parent.__module__}: its child belongs there; "
            "diff A B --as recipe prints it"
        )
    if not differences(parent(), recipe):  # type: ignore[call-arg]  # a registered recipe needs no arguments
        raise UserError(f"{where} trained {parent.name} as it is registered: there is nothing to promote")
    run = re.sub(r'[^ -~]|[\\"]', "?", where)
    source = child_source(parent, recipe, name, f"What the run {run} trained.")
    file, init = folder / f"{_module(name)}.py", folder / "__init__.py"
    if file.exists():
        raise UserError(f"{file} exists already: take another name")
    before, known = init.read_text(), set(Slot.by_name)
    try:
        file.write_text(source)
        init.write_text(_with_import(before, folder.name, file.stem))
        importlib.invalidate_caches()
        importlib.import_module(f"{folder.name}.{file.stem}")
        made: type[Recipe] = RECIPES[name]
        if wrong := differences(made(), recipe):  # type: ignore[call-arg]
            raise UserError(f"as a class it would differ in {', '.join(d.path for d in wrong)}")
    except Exception as error:
        file.unlink(missing_ok=True)
        init.write_text(before)
        _forget(name, f"{folder.name}.{file.stem}", known)
        raise UserError(f"{where} cannot be promoted: {error}") from error
    return file


def _module(name: str) -> str:
    stem = re.sub(r"[.-]", "_", name)
    return f"recipe_{stem}" if stem[0].isdigit() or keyword.iskeyword(stem) else stem


def _with_import(text: str, package: str, module: str) -> str:
    """The text of a package's __init__.py with one import more, in its place in the alphabet."""
    lines = text.splitlines()
    new = f"from {package} import {module} as {module}"
    imports = [i for i, line in enumerate(lines) if line.startswith(f"from {package} import ")]
    later = [i for i in imports if lines[i] > new]
    at = later[0] if later else imports[-1] + 1 if imports else len(lines)
    return "\n".join([*lines[:at], new, *lines[at:]]) + "\n"


def _forget(name: str, module: str, known: set[str]) -> None:
    RECIPES.pop(name, None)
    sys.modules.pop(module, None)
    for new in set(Slot.by_name) - known:
        del Slot.by_name[new]
