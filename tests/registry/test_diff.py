"""From one recipe to another: what differs, applied; as flags; as a child class; and recipes at a commit."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

import registry
from core.at_commit import recipe_at
from core.cli import parse
from core.errors import UserError
from core.recipe_file import delta_flags, dump
from core.recipe_source import child_source
from core.slots import EMA, RECIPES, AdamW8bit, ParamGroup, Recipe, Slot, SlotError
from core.slots.slot import flatten
from core.verbs.diff import apply, differences
from tests.registry.test_round_trips import pairs

ROOT = Path(__file__).parents[2]
SKY, TINY = "lvdm-short-sky", "lvdm-short-sky-tiny"
NAME = "of-a-test"


@given(pairs())
@settings(max_examples=40, deadline=None)
def test_a_difference_applied_to_one_side_is_the_other(pair):
    a, b = pair
    assert apply(differences(a, b), a) == b and apply(differences(b, a), b) == a
    assert not differences(a, a) and bool(differences(a, b)) == (a != b)


@pytest.mark.parametrize("name", registry.names())
def test_between_any_two_recipes_a_difference_leads_from_one_to_the_other(name):
    a = registry.get(name)
    for other in registry.names():
        b = registry.get(other)
        made = apply(differences(a, b), a)
        assert flatten(made) == flatten(b) and (type(made), made.name) == (type(a), a.name)


def test_a_difference_that_makes_no_recipe_is_refused():
    a = registry.get(SKY)
    found = differences(a, registry.get(SKY, "--lr", "0.5"))
    with pytest.raises(SlotError, match=r"AdamW\.lr"):
        apply([found[0]._replace(sides={"b": "high"})], a)


# ------------------------------------------------------------------------------------------------------------- child


def made_by(source: str, name: str = NAME) -> Recipe:
    """The recipe that a module's text registers; afterwards it is forgotten."""
    known = set(Slot.by_name)
    try:
        exec(compile(source, "child.py", "exec"), {"__name__": "child"})
        return RECIPES[name]()
    finally:
        RECIPES.pop(name, None)
        for new in set(Slot.by_name) - known:
            del Slot.by_name[new]


def ruff(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *words, "--config", str(ROOT / "pyproject.toml"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_child_has_the_fields_of_the_other_side_and_is_formatted(tmp_path):
    @given(pairs())
    @settings(max_examples=40, deadline=None)
    def check(pair):
        base, recipe = pair
        source = child_source(type(base), recipe, NAME)
        assert flatten(made_by(source)) == flatten(recipe)
        (tmp_path / f"a{len(list(tmp_path.iterdir()))}.py").write_text(source)

    check()
    for name in registry.names():
        parent, recipe = RECIPES[SKY], registry.get(name)
        source = child_source(parent, recipe, NAME)
        assert flatten(made_by(source)) == flatten(recipe)
        (tmp_path / f"{name}.py").write_text(source)
    anew = ("--config", "format.skip-magic-trailing-comma=true")  # what is on several lines must need them
    for words in (("format", "--check", "--diff", *anew), ("check", "--ignore", "E501")):  # texts are never broken
        done = ruff(tmp_path, *words)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_child_says_only_what_is_other():
    base = registry.get(SKY)
    groups = (ParamGroup(pattern="bias$"),)
    recipe = base.but(
        optim=base.optim.but(lr=2e-5, ema=EMA(decay=0.5), groups=groups),
        system=base.system.but(**{"objective.loss": "mse", "denoiser.dropout": 0.1}),
        data=base.data.but(root=Path("datasets/other")),
    )
    source = child_source(type(base), recipe, NAME)
    assert source.partition("\n\n\n")[0].splitlines() == [
        '"""A variant of lvdm-short-sky."""',
        "",
        "from pathlib import Path",
        "",
        "from core.slots import EMA, Data, Optim, ParamGroup, System, register",
        "from recipes.lvdm import LVDMShortSky",
    ]
    assert '    data: Data = LVDMShortSky.data.but(root=Path("datasets/other"))\n' in source
    assert (
        '    system: System = LVDMShortSky.system.but(**{"denoiser.dropout": 0.1, "objective.loss": "mse"})\n' in source
    )
    assert "    optim: Optim = LVDMShortSky.optim.but(lr=2e-5, " in source and "loop" not in source


def test_numbers_are_written_as_people_do():
    base = registry.get(SKY)
    for value, text in ((0.0001, "1e-4"), (1.5e-05, "1.5e-5"), (0.25, "0.25"), (100.0, "100.0"), (1e22, "1e22")):
        assert f"but(lr={text})\n" in child_source(type(base), base.but(optim=base.optim.but(lr=value)), NAME)


def test_a_child_with_another_class_writes_it_out():
    base = registry.get(SKY)
    recipe = base.but(optim=AdamW8bit(lr=0.5))
    assert "    optim: Optim = AdamW8bit(lr=0.5)\n" in child_source(type(base), recipe, NAME)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["diff", SKY, TINY, "--as", "flag"],
            "--as flag: expected one of table, flags, recipe (did you mean 'flags'?)",
        ),
        (["diff", SKY, TINY, "--as"], "--as takes one value, got none"),
        (["diff", SKY, TINY, "--as", "flags", "--as=recipe"], "--as is given twice"),
        (["diff", SKY, TINY, "--as", "flags", "--json"], "give one of them"),
        (["diff", SKY, TINY, "--name", "x"], "--name is the name of the recipe that --as recipe prints"),
        (["diff", SKY, TINY, "--as", "recipe", "--name", "A b"], "'A b' is no name of a recipe"),
        (["diff", SKY, TINY, "--as", "recipe", "--name", TINY], "is called 'lvdm-short-sky-tiny' already"),
        (["diff", SKY, f"{SKY}@no-such-branch"], "lvdm-short-sky@no-such-branch: git finds no such commit"),
        (["diff", SKY, f"{SKY}@--output=x"], "git finds no such commit"),
    ],
)
def test_mistakes_of_diff_are_one_line(words, message, capsys):
    assert registry.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_the_verb_prints_flags_and_a_child(capsys):
    other = f"{SKY} --lr 0.5 --optim.ema=EMA"
    assert registry.main(["diff", SKY, other, "--as", "flags"]) == 0
    flags = capsys.readouterr().out
    assert flags == "--optim.ema=EMA --lr 0.5\n"
    assert registry.get(f"{SKY} {flags}") == registry.get(other)
    assert registry.main(["diff", SKY, other, "--as=recipe", "--name", NAME]) == 0
    assert flatten(made_by(capsys.readouterr().out)) == flatten(registry.get(other))
    assert registry.main(["diff", SKY, SKY, "--as", "flags"]) == 0
    assert capsys.readouterr().out == "\n"


def test_flags_from_any_side_parse_back(tmp_path):
    recipe = registry.get(TINY, "--lr", "0.5", "--validation.metric=None")
    (tmp_path / "recipe.json").write_text(dump(recipe))
    for name in (SKY, TINY):
        base = registry.get(name)
        assert flatten(parse(shlex.split(shlex.join(delta_flags(recipe, base))), base)[0]) == flatten(recipe)


def test_a_deep_change_is_one_of_the_slot_in_question():
    system = registry.get("lvdm-text2video").system
    made = system.but(**{"objective.loss": "l1", "conditions.0.dropout": 0.25})
    assert made.objective == system.objective.but(loss="l1")
    assert made.conditions == (system.conditions[0].but(dropout=0.25),)
    for path, message in (
        ("objective.los", "Objective has no field 'los'"),
        ("conditions.1.dropout", "has 1 parts"),
        ("conditions.dropout", "has 1 parts"),
        ("objective.loss.x", "Objective.loss = .* holds no slot"),
        ("nothing.loss", "Diffusion has no field 'nothing'"),
    ):
        with pytest.raises(SlotError, match=message):
            system.but(**{path: 1})


# ------------------------------------------------------------------------------------------------------- at a commit


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository of this project with three commits: nothing of it, another rate, a recipe that does not load."""
    root = tmp_path_factory.mktemp("checkout")
    git(root, "init", "--initial-branch", "main")
    (root / "README.md").write_text("nothing yet")
    (root / "setup.py").write_text("")
    git(root, "add", ".")
    git(root, "commit", "--message", "nothing")
    git(root, "tag", "nothing")
    for file in [
        ROOT / "registry.py",
        *(f for part in ("core", "data", "recipes") for f in (ROOT / part).rglob("*.py")),
    ]:
        target = root / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    lvdm = root / "recipes" / "lvdm.py"
    lvdm.write_text(lvdm.read_text().replace("AdamW(lr=6e-5,", "AdamW(lr=7e-5,"))
    git(root, "add", ".")
    git(root, "commit", "--message", "another rate")
    git(root, "tag", "old/rate")
    lvdm.write_text(lvdm.read_text().replace("AdamW(lr=7e-5,", "AdamW(rate=7e-5,"))
    git(root, "commit", "--all", "--message", "broken")
    return root


def test_a_recipe_at_a_commit_is_as_its_code_said_then(checkout):
    then = recipe_at(f"{SKY}@old/rate --seed 5", checkout)
    assert [(d.path, d.sides) for d in differences(then, registry.get(SKY))] == [
        ("optim.lr", {"a": 7e-5, "b": 6e-5}),
        ("loop.seed", {"a": 5, "b": 23}),
    ]
    assert type(then) is RECIPES[SKY] and registry.get(SKY).optim.lr == 6e-5


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (f"{SKY}@nothing", "has no registry.py, so no registry"),
        (f"{SKY}@main", "does not show it: the recipes cannot be loaded: recipes/lvdm.py line"),
        ("nobody@old/rate", "does not show it: no recipe is called 'nobody'"),
        (f"{SKY}@old/rate 'x", "cannot be read as a recipe at a commit"),
        (f"{SKY}@", "git finds no such commit"),
    ],
)
def test_a_commit_that_does_not_say_it_is_named_in_a_line(checkout, side, message):
    with pytest.raises(UserError, match=message) as caught:
        recipe_at(side, checkout)
    assert "\n" not in str(caught.value)


def test_outside_of_git_there_is_no_commit(tmp_path):
    with pytest.raises(UserError, match="not a git repository"):
        recipe_at(f"{SKY}@main", tmp_path)


def test_json_is_whole(capsys):
    assert registry.main(["diff", SKY, f"{SKY} --lr 0.5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"] == [{"field": "optim.lr", "a": 6e-5, "b": 0.5}]
