"""What must be there before anything starts: weights of frozen parts, data, a place to write. All that is missing, in one screen."""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import UserError
from core.slots import Autoencoder, Data, Recipe, Slot
from core.slots.slot import field_types

DATA_SOURCES = {
    "sky_timelapse": "Sky Timelapse: github.com/weixiong-ur/mdgan names the archive; unpack it to root/{train,test}/<video>/<clip>/*.jpg",
}


def preflight(recipe: Recipe) -> None:
    """Raise UserError that names every missing field, its published source and the command that goes on."""
    missing = [*_missing_weights(recipe), *_missing_data(recipe)]
    if missing:
        twin = f"{recipe.name}-tiny" if not recipe.name.endswith("-tiny") else recipe.name
        raise UserError(
            f"{recipe.name} cannot start, {len(missing)} thing{'s are' if len(missing) > 1 else ' is'} missing:\n"
            + "\n".join(f"  {n}. {text}" for n, text in enumerate(missing, 1))
            + f"\nWithout any of them: `python -m registry run {twin}` trains the tiny twin, `run {recipe.name} --dry-run` shows the plan."
        )


def _missing_weights(recipe: Recipe) -> list[str]:
    return [
        f"{path}.weights is not set. This part is frozen, so it needs trained weights.\n"
        f"     published: {slot.source or 'nowhere'}\n"
        f"     get them:  {_command(slot.source)}\n"
        f"     then:      --{path.replace('_', '-')}.weights weights/{_file(slot.source)}"
        for path, slot in frozen_parts(recipe)
        if slot.weights is None
    ]


def frozen_parts(recipe: Recipe) -> list[tuple[str, Autoencoder]]:
    """The frozen slots of a recipe with their dotted paths: an autoencoder beside something else that is trained."""
    system = recipe.system
    fields = {name: getattr(system, name) for name in field_types(type(system))}
    trains_it = [name for name, value in fields.items() if isinstance(value, Slot)] == ["autoencoder"]
    return [(f"system.{n}", v) for n, v in fields.items() if isinstance(v, Autoencoder) and not trains_it]


def _file(source: str) -> str:
    return source.rpartition("file ")[2] or "<file>"


def _command(source: str) -> str:
    hub, _, file = source.removeprefix("hub: ").partition(", file ")
    return f"hf download {hub} {file} --local-dir weights" if source.startswith("hub: ") else "train it with the recipe of its own"


def _missing_data(recipe: Recipe) -> list[str]:
    return [text for field, data in (("data", recipe.data), ("validation.data", recipe.validation_data)) if (text := _absent(field, data))][:1]


def _absent(field: str, data: Data) -> str | None:
    root = data.needs()
    if root is None or root.exists():
        return None
    source = DATA_SOURCES.get(root.name, "see the recipe's docstring")
    return f"{field}.root = {root} does not exist.\n     published: {source}\n     then:      --data-root <that folder>"


def writable(folder: Path) -> None:
    """Raise UserError when nothing can be written into `folder` (which is made)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there ({error.strerror}); name another folder") from None
