"""recipe.json: what is in it, and what is said of files that are none."""

import json

import pytest

import registry
from core.cli import parse
from core.errors import UserError
from core.recipe_file import MAX_BYTES, dump, load, read, recipe_hash
from core.slots import RECIPES, Recipe, Slot
from core.slots.slot import field_types

NAME = "lvdm-short-sky-tiny"


@pytest.fixture
def recipe() -> Recipe:
    return registry.get(NAME)


def changed(base: Recipe, **changes) -> str:
    return json.dumps(json.loads(dump(base)) | changes)


def with_fields(recipe: Recipe, **fields) -> str:
    value = json.loads(dump(recipe))
    return json.dumps(value | {"fields": value["fields"] | fields})


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, "some.json")
    assert "some.json" in str(caught.value)
    return str(caught.value)


def test_the_file_says_format_name_and_fields(recipe):
    value = json.loads(dump(recipe))
    assert list(value) == ["format", "recipe", "fields"]
    assert (value["format"], value["recipe"]) == (1, NAME)
    assert value["fields"]["optim"]["is"] == "AdamW"
    assert dump(recipe).isascii()


def test_the_hash_ignores_name_and_tracking_and_nothing_else(recipe):
    class Renamed(type(recipe)):
        """Another class with another name, the same fields."""

    assert recipe_hash(Renamed()) == recipe_hash(recipe)
    assert recipe_hash(recipe.but(tracking=recipe.tracking.but(experiment="other"))) == recipe_hash(recipe)
    assert recipe_hash(recipe.but(loop=recipe.loop.but(seed=1))) != recipe_hash(recipe)


def test_a_name_that_is_no_longer_registered_loads_as_a_plain_recipe_with_its_name(recipe):
    text = changed(recipe, recipe="gone-since")
    again = load(text, "x")
    assert type(again) is Recipe and again.name == "gone-since"
    assert json.loads(dump(again)) == json.loads(text)
    assert recipe_hash(again) == recipe_hash(recipe)
    assert parse(["--lr", "1"], again)[0].name == parse([], again)[0].name == "gone-since"
    assert again.but(loop=again.loop.but(seed=1)).name == "gone-since"
    assert "gone-since" not in RECIPES and Recipe.name == ""


def test_a_newer_format_asks_for_an_upgrade(recipe):
    assert "has format 2, this version reads up to 1: upgrade" in refusal(changed(recipe, format=2))


@pytest.mark.parametrize("version", [0, "1", None, True, 1.0])
def test_an_unknown_format_is_refused(recipe, version):
    assert "is not known" in refusal(changed(recipe, format=version))


def test_unknown_missing_and_wrong_fields_are_named(recipe):
    assert "unknown field extra" in refusal(with_fields(recipe, extra=1))
    value = json.loads(dump(recipe))
    del value["fields"]["optim"]["lr"]
    assert "some.json.optim (AdamW): missing field lr" in refusal(json.dumps(value))
    assert "some.json.data" in refusal(with_fields(recipe, data={"is": "EMA"}))
    assert "some.json.loop" in refusal(with_fields(recipe, loop=3))
    assert "is no recipe" in refusal(with_fields(recipe, **{"is": "Recipe"}))


def test_a_file_from_before_a_field_means_what_it_meant_then(recipe):
    value = json.loads(dump(recipe))
    del value["fields"]["system"]["objective"]["noise_offset"]
    assert load(json.dumps(value), "some.json") == recipe
    for cls in Slot.by_name.values():
        assert set(cls.since) <= set(field_types(cls))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
        ("[]", "expected"),
        ('{"recipe": "x"}', "expected"),
        ('{"format": 1}', '"recipe" must be a name'),
        ('{"format": 1, "recipe": 3, "fields": {}}', '"recipe" must be a name'),
        ('{"format": 1, "format": 1}', "'format' stands twice"),
        (" " * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_reason(text, why):
    assert why in refusal(text)


def test_every_truncation_is_refused(recipe):
    text = dump(recipe).rstrip()
    for end in range(0, len(text), 97):
        assert "not valid JSON" in refusal(text[:end])


def test_deep_nesting_inside_a_field_is_refused(recipe):
    deep = '{"is":"Loop","a":' * 5000 + "1" + "}" * 5000
    text = dump(recipe).replace('"fields": {', f'"fields": {{"x": {deep},', 1)
    assert "nested too deeply" in refusal(text) or "unknown field" in refusal(text)


def test_a_recipe_is_read_from_its_file_or_its_directory(recipe, tmp_path):
    (tmp_path / "recipe.json").write_text(dump(recipe))
    assert read(tmp_path) == read(tmp_path / "recipe.json") == recipe


def test_files_that_cannot_be_read_are_user_errors(tmp_path):
    (tmp_path / "noise.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge.json").write_bytes(b" " * (MAX_BYTES + 2))
    for path, why in (
        ("noise.json", "cannot be read"),
        ("huge.json", "larger than"),
        (".", "holds no recipe.json"),
        ("no", "does not exist"),
    ):
        with pytest.raises(UserError, match=why):
            read(tmp_path / path)
