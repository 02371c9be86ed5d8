"""The registry: names to recipes, verbs to functions. `python -m registry --help` says what there is.

From Python: `from registry import get, run, names, register, Recipe`.
Nothing heavy is imported before it is needed: `list`, `show` and `diff` answer without torch, `--version` without a
recipe.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.slots import Recipe as Recipe
    from core.slots import Slot
    from core.slots import register as register

__all__ = ["Recipe", "get", "main", "names", "register", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Recipe", "register"):
        import core.slots

        return getattr(core.slots, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ------------------------------------------------------------------------------------------------------------ recipes


@functools.cache
def _recipes() -> dict[str, type[Recipe]]:
    """All recipes by name: this project's, then those of installed packages."""
    from core.plugins import load_plugins
    from core.slots.recipe import RECIPES

    _load_own()
    load_plugins(RECIPES)
    return RECIPES


def _load_own() -> None:
    from core.errors import UserError

    try:
        import recipes  # noqa: F401
    except Exception as error:  # whatever a recipe file does wrong is said in one line
        from core.plugins import line_of

        raise UserError(f"the recipes cannot be loaded: {line_of(error)}{type(error).__name__}: {error}") from error


def names() -> list[str]:
    """Names of all recipes, a family together, full size before its twin."""
    return list(_recipes())


def _make(name: str) -> Recipe:
    recipe: Any = _recipes()[name]
    return recipe()


def get(name: str, *flags: str) -> Recipe:
    """The recipe called `name`, with overrides.

    `get("lvdm-short-sky --lr 6e-5")` and `get("lvdm-short-sky", "--lr", "6e-5")` are the same. Raises UserError for
    an unknown name, flag or value.
    """
    from core.errors import UserError, did_you_mean

    try:
        head, *inline = shlex.split(name) or [""]
    except ValueError as error:
        raise UserError(f"{name!r} cannot be read as a name and flags: {error}") from None
    known = _recipes()
    if head not in known:
        raise UserError(f"no recipe is called {head!r}{did_you_mean(head, known)}; `python -m registry list` shows all")
    recipe = _make(head)
    if inline or flags:
        from core.cli import parse

        (recipe,) = parse([*inline, *flags], recipe)
    return recipe


def run(recipe: Recipe | str, **launch: Any) -> int:
    """Train a recipe, or the one called so (overrides allowed). Keywords are the launch's: output_dir, nproc, …

    Returns the exit code of the run (0: finished). Raises UserError, also for a recipe whose name is not registered.
    """
    from core.recipe_file import delta_flags
    from core.slots.launch import Launch
    from core.verbs.run import run as train

    recipe = get(recipe) if isinstance(recipe, str) else recipe
    where = Launch().but(**launch)
    # The words are what each process of a run on several starts from, so they must say the same recipe.
    words = [*delta_flags(recipe, get(recipe.name)), *delta_flags(where, Launch())]
    return train(recipe, where, ["run", recipe.name, *words])


# -------------------------------------------------------------------------------------------------------------- verbs


def _take(words: list[str], flag: str) -> bool:
    """Whether `flag` is among the words; it is taken out."""
    found = flag in words
    words[:] = [word for word in words if word != flag]
    return found


def _first(words: list[str], verb: str, count: int = 1) -> list[str]:
    """The words that a verb needs before its flags."""
    from core.errors import UserError
    from core.verbs.help import VERBS

    given = [word for word in words[:count] if not word.startswith("-")]
    if len(given) < count:
        raise UserError(f"{verb} needs {VERBS[verb].takes}, for example: {VERBS[verb].example}")
    return given


def _help(words: list[str], verb: str, *parts: Slot, named: bool = False) -> int:
    """Print a verb's help; where it takes a recipe and one is `named`, with that recipe's flags."""
    from core.verbs.help import print_verb

    if named and not words[0].startswith("-"):
        return print_verb(words, verb, get(words[0]), *parts)
    return print_verb([], verb, *(() if named else parts))


def _wants_help(words: list[str]) -> bool:
    return "--help" in words or "-h" in words


def _list(words: list[str]) -> int:
    from core.verbs.list import print_list

    if _wants_help(words):
        return _help(words, "list")
    as_json = _take(words, "--json")
    from core.verbs.find import matching

    return print_list(matching(words, map(_make, names())), as_json)


def _show(words: list[str]) -> int:
    from core.verbs.show import print_recipe

    if _wants_help(words):
        return _help(words, "show", named=True)
    as_json, origin = _take(words, "--json"), _take(words, "--origin")
    (name,) = _first(words, "show")
    print_recipe(get(name, *words[1:]), as_json, origin)
    return 0


def _diff(words: list[str]) -> int:
    from core.verbs.flags import StoreFlags

    if _wants_help(words):
        return _help(words, "diff", StoreFlags())
    as_json = _take(words, "--json")
    _first(words, "diff", 2)
    from core.verbs.diff import diff

    return diff(words, names(), get, as_json)


def _run(words: list[str]) -> int:
    from core.cli import parse
    from core.slots.launch import Launch

    if _wants_help(words):
        return _help(words, "run", Launch(), named=True)
    (name,) = _first(words, "run")
    recipe, launch = parse(words[1:], get(name), Launch())
    from core.verbs.run import run as train

    return train(recipe, launch, ["run", *words])


def _launch(words: list[str]) -> int:
    from core.slots.launch import Launch
    from core.verbs import launch as verb

    if _wants_help(words):
        return _help(words, "launch", Launch(), verb.ClusterFlags(), named=True)
    (name,) = _first(words, "launch")
    return verb.launch(words[1:], get(name))


def _resume(words: list[str]) -> int:
    from core.errors import UserError
    from core.slots.launch import Launch
    from core.verbs.flags import value_of

    if _wants_help(words):
        return _help(words, "resume", Launch())
    (where,) = _first(words, "resume")
    if value_of("resume", words[1:]) is not None:
        raise UserError("resume: the run is the first word here; leave out --resume")
    _recipes()
    from core.verbs.resume import resume

    return resume(where, words[1:], value_of("store", words[1:]))


def _generate(verb: str, kind: str, words: list[str]) -> int:
    """A verb that makes clips from a source, on one process or several, and prints the folder that they are in."""
    from importlib import import_module

    from core.cli import parse
    from core.errors import UserError
    from core.verbs import flags as kinds

    flags, value_of = getattr(kinds, kind)(), kinds.value_of
    if _wants_help(words):
        return _help(words, verb, flags)
    (where,) = _first(words, verb)
    named = {flag: value_of(flag, words[1:]) for flag in ("recipe", "weights", "store")}
    known = names()
    from core.sources import find_source

    try:
        source = find_source(where, get, known, **named)
    except UserError:
        parse(words[1:], flags)  # a mistyped flag is the nearer mistake
        raise
    (flags,) = parse(words[1:], flags.but(sampler=source.recipe.validation.sampler))
    from core.verbs.run import torchrun

    verbs = import_module(f"core.verbs.{verb}")
    verbs.asked(source, flags)  # said once, not by each process
    if flags.nproc > 1 and "WORLD_SIZE" not in os.environ:
        return torchrun(flags.nproc, [verb, *words])
    out = verbs.run(source, flags)
    if int(os.environ.get("RANK", "0")) == 0:
        print(out)
    return 0


def _promote(words: list[str]) -> int:
    from core.verbs.flags import StoreFlags

    if _wants_help(words):
        return _help(words, "promote", StoreFlags())
    (where,) = _first(words, "promote")
    names()
    from core.verbs.promote import promote

    return promote(where, words[1:], sys.modules["recipes"].__path__[0])


def _measure(words: list[str]) -> int:
    from core.cli import parse
    from core.verbs.flags import MeasureFlags

    if _wants_help(words):
        return _help(words, "measure-latents", MeasureFlags(), named=True)
    (name,) = _first(words, "measure-latents")
    recipe, flags = parse(words[1:], get(name), MeasureFlags())
    from core.verbs.measure import measure_latents

    found = measure_latents(recipe, **flags.arguments())
    print("\n".join(f"{field} {value!r}" for field, value in found.items()))
    return 0


def _weights(words: list[str]) -> int:
    from core.verbs import weights_words as verb

    if _wants_help(words):
        return _help(words, "weights", *(kind() for what, kind in verb.FLAGS.items() if what == words[0]))
    _first(words, "weights", 2)
    names()  # a run is read with the recipes known
    return verb.weights(words, get, lambda: map(_make, names()))


def _data(words: list[str]) -> int:
    from core.verbs import data as verb

    if _wants_help(words):
        return _help(words, "data", *(kind() for what, kind in verb.FLAGS.items() if what == words[0]))
    _first(words, "data", 2)
    from data import check, laion

    return verb.data(words, verb.Work(laion.make, laion.write_lists, laion.convert, check.check, get))


def _sync(words: list[str]) -> int:
    from core.cli import parse
    from core.verbs.flags import StoreFlags

    if _wants_help(words):
        return _help(words, "sync", StoreFlags())
    where = words.pop(0) if words and not words[0].startswith("-") else None
    (flags,) = parse(words, StoreFlags())
    from core.verbs.sync import sync

    return sync(where, flags.store)


def _of_flags(verb: str, kind: str, function: str, words: list[str]) -> int:
    """A verb that takes flags alone, all of one class: a function of its module gets them."""
    from importlib import import_module

    from core.cli import parse
    from core.verbs import flags

    none: Slot = getattr(flags, kind)()
    if _wants_help(words):
        return _help(words, verb, none)
    (given,) = parse(words, none)
    code: int = getattr(import_module(f"core.verbs.{verb}"), function)(given)
    return code


def _translate(words: list[str]) -> int:
    if words[:1] in (["--help"], ["-h"]):
        return _help(words, "translate")
    _first(words, "translate")
    from core.verbs.translate import translate

    return translate(words, get)


DO: dict[str, Callable[[list[str]], int]] = {
    "list": _list,
    "show": _show,
    "diff": _diff,
    "run": _run,
    "launch": _launch,
    "resume": _resume,
    "sample": functools.partial(_generate, "sample", "SampleFlags"),
    "eval": functools.partial(_generate, "eval", "EvalFlags"),
    "measure-latents": _measure,
    "weights": _weights,
    "data": _data,
    "sync": _sync,
    "runs": functools.partial(_of_flags, "runs", "RunsFlags", "runs"),
    "promote": _promote,
    "doctor": functools.partial(_of_flags, "doctor", "DoctorFlags", "doctor"),
    "ui": functools.partial(_of_flags, "ui", "UiFlags", "serve"),
    "translate": _translate,
}


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        from core.verbs.help import overview

        print(overview())
        return 0
    if words[0] not in DO:
        from core.errors import UserError, did_you_mean

        kind = "unknown flag" if words[0].startswith("-") else "unknown verb"
        near = did_you_mean(words[0], [*DO, "--version", "--help"])
        raise UserError(f"{kind} {words[0]!r}{near}; verbs: {', '.join(DO)}")
    if words[0] in ("list", "show"):
        _take(words, "--debug")
    return DO[words[0]](words[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: a mistake of the user's is one line on stderr and 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--version"], ["-V"]):
        print(__version__)
        return 0
    from core.errors import UserError, tell

    debug = "--debug" in words or os.environ.get("REGISTRY_DEBUG", "") not in ("", "0")
    try:
        code = _dispatch(words[1:] + words[:1] if words[:1] == ["--debug"] else words)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: whoever read has seen enough; the interpreter must not flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        tell(error, debug)
        return 2
    return code


if __name__ == "__main__":
    import registry  # packages with recipes import it by this name: one module, not two

    sys.exit(registry.main())
