"""The card of weights on the hub: which recipe, on which data, with which metrics and samples, and how to use them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.journal import FILE_NAME as JOURNAL
from core.journal import Event, read
from core.provenance import recipe_delta
from core.recipe_file import FILE_NAME
from core.recipe_file import read as read_recipe
from core.redact import redact
from core.slots import Recipe
from core.weights.names import INDEX

APART = ("system/", "time/")
"""Metrics of the machine, which say nothing of the weights."""


@dataclass(frozen=True)
class About:
    """What a card is of."""

    folder: Path
    """The exported networks, with their recipe.json if there is one."""
    run: Path | None
    """Output directory of the run that they are from."""
    step: int | None
    """Update of the checkpoint. None: the end of the run."""
    averaged: bool | None
    """Whether it is the moving average; None: as the run exports."""
    place: str
    """Folder in the repository; empty: its root."""


def card(about: About, repo: str, samples: Sequence[Path]) -> str:
    """The card as Markdown with a YAML head. Secrets are hidden."""
    recipe = read_recipe(about.folder) if (about.folder / FILE_NAME).is_file() else None
    events = _events(about)
    parts = [_head(recipe), f"# {repo.rpartition('/')[2]}", *_recipe(recipe, about, events)]
    parts += [*_samples(samples), *_data(events), *_metrics(about, events), *_use(about, repo)]
    return redact("\n\n".join(parts) + "\n")


def samples_of(about: About) -> list[Path]:
    """The newest samples of the run up to the step: an animation or a picture, and their texts."""
    root = about.run / "samples" if about.run else None
    steps = sorted(root.glob("step-*"), reverse=True) if root and root.is_dir() else []
    for folder in steps:
        number = folder.name.removeprefix("step-")
        if not number.isdecimal() or (about.step is not None and int(number) > about.step):
            continue
        shown = next((path for kind in ("gif", "png") if (path := folder / f"samples.{kind}").is_file()), None)
        if shown:
            return [path for path in (shown, folder / "samples.txt") if path.is_file()]
    return []


def _events(about: About) -> list[Event]:
    journal = about.run / JOURNAL if about.run else None
    return [event for event, _ in read(journal)] if journal and journal.is_file() else []


def _head(recipe: Recipe | None) -> str:
    """What the hub files it under."""
    lines = ["library_name: diffusers"]
    task = _task(recipe) if recipe else None
    lines += [f"pipeline_tag: {task}"] if task else []
    lines += ["tags:", "- diffusion", *([f"- {recipe.name}"] if recipe and recipe.name else [])]
    return "\n".join(["---", *lines, "---"])


def _task(recipe: Recipe) -> str | None:
    """The hub's word for what the recipe makes; None where it has none."""
    if not hasattr(recipe.system, "denoiser"):
        return None
    moving = recipe.data.clip_shape()[0] > 1
    if recipe.told:
        return "text-to-video" if moving else "text-to-image"
    return None if moving else "unconditional-image-generation"


def _recipe(recipe: Recipe | None, about: About, events: Sequence[Event]) -> Iterator[str]:
    if recipe is None:
        return
    yield (inspect.getdoc(type(recipe)) or "").strip()
    delta = recipe_delta(recipe)
    changed = f" with `{delta}`" if delta else ", as it is registered"
    rows = {
        "recipe": f"`{recipe.name}`{changed}; every field is in `{_below(about, FILE_NAME)}`",
        "step": "" if about.step is None else f"{about.step:,}",
        "weights": {None: "", True: "moving average", False: "raw"}[about.averaged],
        "in": f"`{about.place}`" if about.place else "",
        "commit": next((f"`{c}`" for e in events if (c := e.get("values", {}).get("mlflow.source.git.commit"))), ""),
    }
    yield _table(("", ""), [(name, value) for name, value in rows.items() if value])


def _below(about: About, name: str) -> str:
    return f"{about.place}/{name}" if about.place else name


def _samples(samples: Sequence[Path]) -> Iterator[str]:
    if not samples:
        return
    yield f"## Samples\n\n![samples](samples/{samples[0].name})"
    if len(samples) > 1:
        texts = samples[1].read_text(encoding="utf-8").splitlines()
        yield "\n".join(f"{number}. {_cell(text)}" for number, text in enumerate(texts, 1))


def _data(events: Sequence[Event]) -> Iterator[str]:
    last = next((event for event in reversed(events) if event["event"] == "data"), None)
    if last is None:
        return
    rows = [
        (found["context"], str(name), str(value))
        for found in last["sets"]
        for name, value in (found.get("profile") or {}).items()
    ]
    yield "## Data\n\n" + _table(("set", "", ""), rows)


def _metrics(about: About, events: Sequence[Event]) -> Iterator[str]:
    """The newest point of each up to the step."""
    newest: dict[str, tuple[float, int]] = {}
    for event in events:
        if event["event"] == "metrics" and (about.step is None or event["step"] <= about.step):
            newest |= {k: (v, event["step"]) for k, v in event["values"].items() if not k.startswith(APART)}
    if newest:
        rows = [(name, f"{value:.6g}", str(step)) for name, (value, step) in sorted(newest.items())]
        yield "## Metrics\n\n" + _table(("metric", "value", "step"), rows)


def _use(about: About, repo: str) -> Iterator[str]:
    folder = f"weights/{repo.rpartition('/')[2]}"
    lines = [f"hf download {repo} --local-dir {folder}"]
    if (about.folder / FILE_NAME).is_file():
        lines.append(f"python -m registry sample {_joined(folder, about.place)}")
    yield "## Use\n\n```sh\n" + "\n".join(lines) + "\n```"
    index = about.folder / INDEX
    if index.is_file() and not about.place:
        name = json.loads(index.read_text())["_class_name"]
        yield f"```python\nfrom diffusers import {name}\n\npipeline = {name}.from_pretrained({repo!r})\n```"


def _joined(folder: str, place: str) -> str:
    return f"{folder}/{place}" if place else folder


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[Any]] = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """On one line, and neither column, tag nor link where the text came from a file."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("](", "] (")
