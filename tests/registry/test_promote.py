"""`promote`: a run's recipe becomes a class among the recipes, or nothing changes."""

import subprocess
import sys
from pathlib import Path

import pytest

import registry
from core.errors import UserError
from core.recipe_file import dump
from core.slots import RECIPES, Recipe, Slot
from core.slots.slot import flatten
from core.verbs.promote import promote, write_child
from tests.tracking.running import opened

ROOT = Path(__file__).parents[2]
TINY = "lvdm-short-sky-tiny"
OTHER = (TINY, "--lr", "0.5", "--system.objective.loss", "l1", "--optim.ema=None")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of recipes of its own, and the registry as it was afterwards."""
    folder = tmp_path / "kept_recipes"
    folder.mkdir()
    lines = ["from kept_recipes import able as able", "from kept_recipes import zebra as zebra"]
    (folder / "__init__.py").write_text("\n".join(['"""Recipes."""', "", *lines]) + "\n")
    for name in ("able", "zebra"):
        (folder / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    recipes, slots = dict(RECIPES), dict(Slot.by_name)
    yield folder
    for table, old in ((RECIPES, recipes), (Slot.by_name, slots)):
        for name in set(table) - set(old):
            del table[name]
    for name in [name for name in sys.modules if name.partition(".")[0] == "kept_recipes"]:
        del sys.modules[name]


def test_a_run_becomes_a_recipe_that_is_there_at_once(package, store, tmp_path, capsys):
    recipe = registry.get(*OTHER)
    tracker = opened(tmp_path / "run", store, recipe)
    tracker.artifact(tmp_path / "run" / "recipe.json")
    tracker.close("FINISHED")
    for where, name in ((str(tmp_path / "run"), "from-folder"), (tracker.run_id, "3.from-mlflow")):
        assert promote(where, ["--as", name, "--store", store], str(package)) == 0
        file = Path(capsys.readouterr().out.splitlines()[0])
        made = registry.get(name)
        assert flatten(made) == flatten(recipe) and made.name == name
        assert isinstance(made, RECIPES[TINY]) and type(made).__module__ == f"kept_recipes.{file.stem}"
        assert "lvdm-short-sky-tiny with other system.objective.loss, optim.lr, optim.ema." in type(made).__doc__
    assert [line.split()[-1] for line in (package / "__init__.py").read_text().splitlines()[2:]] == [
        "able",
        "from_folder",
        "recipe_3_from_mlflow",
        "zebra",
    ]
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(package)]
    assert subprocess.run(ruff, capture_output=True).returncode == 0


def state(package: Path) -> tuple[dict[str, str], set[str], set[str]]:
    texts = {path.name: path.read_text() for path in package.glob("*.py")}
    return texts, set(RECIPES), set(Slot.by_name)


def test_what_cannot_be_promoted_changes_nothing(package, tmp_path):
    recipe = registry.get(*OTHER)
    (tmp_path / "recipe.json").write_text(dump(recipe))
    before = state(package)
    plain = Recipe(**{name: getattr(recipe, name) for name in ("data", "system", "optim", "loop")})
    for made, name, message in (
        (registry.get(TINY), "new", "as it is registered: there is nothing to promote"),
        (recipe, TINY, "is called 'lvdm-short-sky-tiny' already"),
        (recipe, "../new", "is no name of a recipe"),
        (recipe, "zebra", "zebra.py exists already"),
        (plain, "new", "no recipe is called ''"),
    ):
        with pytest.raises(UserError, match=message):
            write_child(made, name, "here", package)
        assert state(package) == before
    with pytest.raises(UserError, match="promote needs the name of the new recipe: --as NAME"):
        promote(str(tmp_path), [], str(package))
    (package / "__init__.py").write_text("1 / 0\n")
    before = state(package)
    with pytest.raises(UserError, match="here cannot be promoted: division by zero"):
        write_child(recipe, "new", "here", package)
    assert state(package) == before
