"""The committed text of every recipe is what the recipe says today."""

import difflib

import pytest

import registry
from core.verbs.show import text
from tests.golden_recipes import FOLDER, own_names

REWRITE = "if that is meant, run `python -m tests.golden_recipes` and commit the change"


@pytest.mark.parametrize("name", own_names())
def test_the_committed_text_of_a_recipe_is_its_text_today(name):
    path = FOLDER / f"{name}.txt"
    assert path.exists(), f"{name} has no golden text: run `python -m tests.golden_recipes` and commit it"
    before, now = path.read_text().splitlines(), text(registry.get(name)).splitlines()
    changed = "\n".join(difflib.unified_diff(before, now, "committed", "now", lineterm="", n=0))
    assert not changed, f"{name} has changed; {REWRITE}:\n{changed}"


def test_no_golden_text_is_left_of_a_recipe_that_is_gone():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(own_names()), REWRITE
