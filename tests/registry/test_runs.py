"""`runs`: the runs of a store with what differs from their recipes."""

import json

import registry
from core.recipe_file import dump
from registry import get
from tests.tracking.running import opened

SKY, TINY = "lvdm-short-sky", "lvdm-short-sky-tiny"


def test_runs_are_listed_with_their_delta_the_newest_first(tmp_path, store, capsys):
    registry.main(["runs", "--store", store])
    assert capsys.readouterr().out.startswith("no run is in the MLflow store sqlite:")
    recipes = {"as-it-is": get(TINY), "faster": get(TINY, "--lr", "0.5", "--optim.ema=None"), "large": get(SKY)}
    for name, recipe in recipes.items():
        tracker = opened(tmp_path / name, store, recipe, name)
        tracker.metrics({"loss": 0.25}, 1)
        tracker.close("FINISHED")
    assert registry.main(["runs", "--store", store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["recipe"], run["status"], run["metrics"]) for run in found] == [
        (name, recipe.name, "FINISHED", {"loss": 0.25}) for name, recipe in reversed(recipes.items())
    ]
    for run in found:
        assert dump(get(f"{run['recipe']} {run['recipe.delta']}")) == dump(recipes[run["name"]])
    assert registry.main(["runs", "--store", store, "--recipe", TINY, "--limit", "1"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "recipe.delta" and line.split()[:3] == [found[1]["run"], "faster", "FINISHED"]
    assert line.endswith(f"  0.25            {TINY}  --optim.ema=None --lr 0.5")


def test_mistakes_of_runs_are_one_line(store, capsys):
    for words, message in (
        (["--limit", "0"], "RunsFlags.limit = 0: must be between 1 and 1000"),
        (["--recipe", "a' OR 'b"], "expected the name of a recipe"),
        (["--store", "ftp://x"], "unknown scheme 'ftp'"),
    ):
        assert registry.main(["runs", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err
