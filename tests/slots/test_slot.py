"""The pattern behind every recipe: what plain dataclasses would let pass in silence is an error here."""

import json
from pathlib import Path

import pytest

from core.slots import RECIPES, AdamW, Data, Loop, Objective, Optim, ParamGroup, Recipe, SlotError, VideoVAE, register
from core.slots.slot import Slot, flatten, from_json, to_json
from registry import get, names


def test_an_override_without_annotation_is_an_error():
    with pytest.raises(TypeError, match=r"Loud\.lr has no type annotation, so it would be ignored"):

        class Loud(AdamW):
            lr = 1.0


def test_a_slot_that_recipes_do_not_have_is_an_error_with_the_nearest_one():
    with pytest.raises(SlotError, match=r"no field 'optm' \(did you mean 'optim'\?\)"):

        class Slip(type(get("lvdm-short-sky"))):
            optm: Optim = AdamW()


def test_two_slot_classes_of_one_name_are_an_error():
    with pytest.raises(TypeError, match="two slot classes are called AdamW"):
        type("AdamW", (Optim,), {"__doc__": "Another.", "__module__": "elsewhere"})


def test_a_recipe_needs_a_docstring_and_a_plain_name():
    with pytest.raises(ValueError, match="no docstring"):
        register("no-docstring")(type("NoDocstring", (Recipe,), {"__module__": __name__}))
    with pytest.raises(ValueError, match="lower-case"):
        register("Loud Name")
    assert "no-docstring" not in RECIPES


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AdamW(lr="3"), r"AdamW\.lr = '3': expected a number"),
        (lambda: AdamW(lr=True), r"AdamW\.lr = True: expected a number"),
        (lambda: AdamW(lr=float("nan")), r"AdamW\.lr = nan: expected a finite number"),
        (lambda: AdamW(lr=-1.0), r"AdamW\.lr = -1\.0: must be positive"),
        (lambda: AdamW(betas=[0.9, 0.99]), "not a list"),
        (lambda: Loop(max_steps=True), "a whole number or None"),
        (lambda: Loop(max_steps=1.5), "a whole number or None"),
        (lambda: Loop(), "give max_steps or epochs"),
        (lambda: Loop(max_steps=1, epochs=1), "give max_steps or epochs"),
        (lambda: Loop(max_steps=1, global_batch=3, micro_batch=2), "must be a multiple of micro_batch"),
        (lambda: Objective(loss="mes"), r"did you mean 'mse'"),
        (lambda: Objective(beta_start=0.1, beta_end=0.01), "beta_start"),
        (lambda: VideoVAE(scale_factor=1.0), "together, or neither"),
        (lambda: VideoVAE(downsample=(3, 8, 8)), "power of two"),
        (lambda: ParamGroup(pattern="("), "no regular expression"),
        (lambda: get("lvdm-short-sky").but(data=AdamW()), r"data = .*expected a Data \(.*FrameFolders"),
    ],
)
def test_a_value_that_does_not_fit_names_class_field_value_and_what_is_allowed(make, says):
    with pytest.raises(SlotError, match=says):
        make()


def test_an_int_becomes_a_float_and_a_text_a_path_so_that_equal_recipes_are_equal():
    assert AdamW(lr=1) == AdamW(lr=1.0) and type(AdamW(lr=1).lr) is float
    data = get("lvdm-short-sky").data
    assert data.but(root="here").root == Path("here")


def test_slots_are_frozen_hashable_and_varied_by_but():
    optim = AdamW(lr=1e-3)
    with pytest.raises(AttributeError):
        optim.lr = 2.0
    assert len({optim, AdamW(lr=1e-3), optim.but(lr=2e-3)}) == 2
    with pytest.raises(SlotError, match=r"AdamW has no field 'lrr' \(did you mean 'lr'\?\)"):
        optim.but(lrr=1)


@pytest.mark.parametrize("name", names())
def test_a_recipe_round_trips_through_json_with_its_types(name):
    recipe = get(name)
    again = from_json(Recipe, json.loads(json.dumps(to_json(recipe))), name)
    assert again == recipe and type(again) is type(recipe)
    assert {k: type(v) for k, v in flatten(again).items()} == {k: type(v) for k, v in flatten(recipe).items()}


def test_nothing_named_in_a_file_is_imported():
    with pytest.raises(SlotError, match=r"no slot class 'os\.system' here"):
        from_json(Optim, {"is": "os.system"}, "recipe.optim")
    with pytest.raises(SlotError, match="no slot class 'Loop' here"):
        from_json(Optim, to_json(Loop(max_steps=1)), "recipe.optim")


def test_a_kind_without_data_of_its_own_builds_nothing():
    class Nowhere(Data):
        """Data that are not there."""

    with pytest.raises(NotImplementedError):
        Nowhere().build()
    del Slot.by_name["Nowhere"]
