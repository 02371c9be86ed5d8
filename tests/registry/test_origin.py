"""`show --origin` names the line that gave a field its value."""

import json
from pathlib import Path

import pytest

import registry
from core.slots import Recipe
from core.verbs.origin import origins

ROOT = Path(__file__).parents[2]
SKY, TINY = "lvdm-short-sky", "lvdm-short-sky-tiny"


def line_of(recipe: Recipe, path: str) -> tuple[str, str, str]:
    """Owner, file and the text of the line."""
    origin = origins(recipe)[path]
    file, _, number = origin.place.rpartition(":")
    return origin.owner, Path(file).name, (ROOT / file).read_text().splitlines()[int(number) - 1].strip()


@pytest.mark.parametrize(
    ("name", "path", "owner", "file", "text"),
    [
        (SKY, "optim.lr", "LVDMShortSky", "lvdm.py", "optim: Optim = AdamW(lr=6e-5, weight_decay=0.01)"),
        (SKY, "optim.ema", "Optim", "optim.py", "ema: EMA | None = None"),
        (SKY, "data.resolution", "SKY", "lvdm.py", "resolution=256,"),
        (TINY, "tracking.experiment", "LVDMShortSky", "lvdm.py", 'tracking: Tracking = Tracking(experiment="lvdm")'),
        (TINY, "system.autoencoder.n_hiddens", "TINY_VAE", "lvdm.py", "TINY_VAE = VideoVAE(n_hiddens=4, "),
        (TINY, "system.autoencoder.weights", "LVDMShortSkyTiny", "lvdm.py", "autoencoder=TINY_VAE.but("),
        ("animatediff-full", "data.root", "WEBVID", "lvdm.py", 'root=Path("datasets/webvid"),'),
        (
            "animatediff-lora-tiny",
            "loop.max_steps",
            "AnimateDiffLoRATiny",
            "animatediff.py",
            "loop: Loop = AnimateDiff",
        ),
        ("animatediff-lora-tiny", "loop.seed", "AnimateDiffFullTiny", "animatediff.py", "loop: Loop = Loop("),
        (
            "animatediff-lora-tiny",
            "system.conditions.0.dropout",
            "TINY",
            "animatediff.py",
            "conditions=(TINY_TEXT.but(",
        ),
        ("animatediff-lora-tiny", "system.conditions.0.hidden_size", "TINY_TEXT", "lvdm.py", "hidden_size=64,"),
        ("animatediff-full-tiny", "optim.ema.decay", "AnimateDiffImageFinetuneTiny", "animatediff.py", "ema=EMA(decay"),
    ],
)
def test_the_line_that_sets_a_field_is_found(name, path, owner, file, text):
    found = line_of(registry.get(name), path)
    assert found[:2] == (owner, file) and found[2].startswith(text)


def test_every_field_of_every_recipe_has_a_line_that_is_there():
    for name in registry.names():
        for path, origin in origins(registry.get(name)).items():
            file, _, number = origin.place.rpartition(":")
            assert 0 < int(number) <= len((ROOT / file).read_text().splitlines()), (name, path)


def test_what_was_typed_is_said_to_be(capsys):
    assert registry.main(["show", SKY, "--lr", "0.5", "--origin", "--json"]) == 0
    rows = {row["field"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["optim.lr"] == {"field": "optim.lr", "value": 0.5, "owner": "command line", "place": ""}
    assert rows["optim.weight_decay"]["owner"] == "LVDMShortSky"
    assert registry.main(["show", SKY, "--origin"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    lr = next(line for line in lines if line[0] == "lr")
    assert lr[:3] == ["lr", "6e-05", "LVDMShortSky"] and lr[3].startswith("recipes/lvdm.py:")
