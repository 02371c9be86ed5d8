"""What goes out comes back: recipes to flags, recipes to files, for random recipes near every registered one."""

import shlex
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import registry
from core.cli import parse
from core.errors import UserError
from core.recipe_file import delta_flags, dump, load, recipe_hash
from core.slots import EMA, ColourAndMotion, Launch, ParamGroup, Recipe, Slot, SlotError
from core.swap import spots
from data.slots import FrameFolders

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12).filter(lambda t: t != "None")
WHOLE = {  # fields that hold slots, and what else they may hold
    "optim.ema": st.none() | st.builds(EMA, decay=st.floats(0.1, 0.9), warmup=st.booleans()),
    "optim.groups": st.lists(st.builds(ParamGroup, pattern=st.sampled_from(["bias$", "-x", "a b"])), max_size=2).map(
        tuple
    ),
    "system.autoencoder": st.none(),
    "validation.metric": st.none() | st.builds(ColourAndMotion),
    "validation.data": st.none() | st.builds(FrameFolders, root=st.just(Path("~here")), resolution=st.integers(1, 9)),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a plain type."""
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of([values(option) for option in get_args(hint)])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        items = st.lists(values(args[0]), max_size=4).map(tuple) if args[-1] is ... else st.tuples(*map(values, args))
        return st.just(("a=b", "c=-d")) if args[0] is str else items
    if isinstance(hint, type) and issubclass(hint, Slot):
        return st.just(hint())
    if hint is Path:
        return st.sampled_from([Path(), Path("a b/c"), Path("~/x"), Path("None"), Path("-x"), Path("/é")])
    plain = {
        bool: st.booleans(),
        int: st.integers(0, 2000),
        float: st.floats(0, 1) | st.floats(1e-9, 1e9),
        str: TEXT,
        type(None): st.none(),
    }
    return plain[hint]


def put(slot: Any, path: list[str], value: Any) -> Any:
    """`slot` with `value` at a path; as it was where its checks refuse that."""
    if not path:
        return value
    if not isinstance(slot, Slot):
        return slot
    try:
        return slot.but(**{path[0]: put(getattr(slot, path[0]), path[1:], value)})
    except SlotError:
        return slot


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Recipe, Recipe]:
    """A registered recipe, and it with up to six fields or slots changed."""
    base = recipe = registry.get(draw(st.sampled_from(registry.names())))
    for path in draw(st.lists(st.sampled_from([p for p in spots(base) if "." in p]), max_size=6)):
        hint, now = spots(base)[path]
        if path in WHOLE:
            recipe = put(recipe, path.split("."), draw(WHOLE[path]))
        elif not isinstance(now, (Slot, tuple)) or not any(
            isinstance(v, Slot) for v in (now if isinstance(now, tuple) else (now,))
        ):
            recipe = put(recipe, path.split("."), draw(values(hint))) if path != "system.conditions" else recipe
    return base, recipe


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_the_flags_between_two_recipes_lead_from_one_to_the_other(pair):
    base, recipe = pair
    flags = delta_flags(recipe, base)
    assert parse(flags, base) == (recipe,)
    assert registry.get(f"{base.name} {shlex.join(flags)}") == recipe
    assert bool(flags) == (recipe != base)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_a_recipe_file_gives_back_the_recipe_and_its_hash(pair):
    for recipe in pair:
        again = load(dump(recipe), "here")
        assert (again, type(again), again.name) == (recipe, type(recipe), recipe.name)
        assert dump(again) == dump(recipe)
        assert recipe_hash(again) == recipe_hash(recipe)
    base, recipe = pair
    same = base.but(tracking=recipe.tracking) == recipe
    assert (recipe_hash(base) == recipe_hash(recipe)) == same


@pytest.mark.parametrize("name", registry.names())
def test_between_any_two_recipes_there_are_flags(name):
    for other in registry.names():
        base, recipe = registry.get(name), registry.get(other)
        (made,) = parse(delta_flags(recipe, base), base)
        assert {path: spot.value for path, spot in spots(made).items()} == {
            p: s.value for p, s in spots(recipe).items()
        }


def test_flags_are_short_and_leave_out_what_follows():
    base = registry.get("lvdm-video-vae")
    recipe = base.but(loop=base.loop.but(max_steps=5, epochs=None, tf32=False), optim=base.optim.but(lr=0.5, ema=EMA()))
    assert delta_flags(recipe, base) == ["--optim.ema=EMA", "--lr", "0.5", "--max-steps", "5", "--loop.no-tf32"]
    assert delta_flags(Launch(nproc=2, dry_run=True), Launch()) == ["--nproc", "2", "--dry-run"]


@pytest.mark.parametrize("root", ["~/x", "~no-such-user", "-x", "None", ".", "a b/c"])
def test_paths_that_look_like_something_else_survive_as_flags(root):
    base = registry.get("lvdm-short-sky")
    recipe = base.but(data=base.data.but(root=Path(root)))
    assert parse(delta_flags(recipe, base), base) == (recipe,)


def test_a_text_that_no_flag_can_say_is_refused_by_name():
    with pytest.raises(UserError, match=r"run_name = 'None' cannot be written as a flag"):
        delta_flags(Launch(run_name="None"), Launch())
    base = registry.get("lvdm-short-sky")
    with pytest.raises(UserError, match=r"tracking.tags .* cannot be written as a flag"):
        delta_flags(base.but(tracking=base.tracking.but(tags=("a=b", "--c=d"))), base)
