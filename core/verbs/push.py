"""`weights push`: the networks of a run, of a checkpoint, or a folder of them, to the hub, with a model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from core.errors import UserError
from core.hub import Hub
from core.model_card import About, card, samples_of
from core.pushing import FOLDER

STEP = re.compile(r"step-(\d+)")


def push(
    where: str, *, repo: str | None, private: bool, every: bool, inside: str | None, raw: bool, store: str | None
) -> int:
    """Upload what `where` names: a run (its newest checkpoint, or `every` one), a checkpoint folder, or an exported
    folder as it is. Prints the addresses. Raises UserError for what cannot be pushed.
    """
    if repo is None:
        raise UserError("weights push: --repo NAMESPACE/NAME says where to")
    hub = Hub(repo, private)
    folder = Path(where).expanduser()
    one = (folder / "state.json").is_file() or _is_export(folder)
    jobs = [(folder, inside or "")] if one else [*_of_run(where, store, every, inside or "")]
    hub.create()
    for what, place in jobs:
        print(_pushed(hub, what, place, raw), flush=True)
    return 0


def _of_run(where: str, store: str | None, every: bool, inside: str) -> Iterator[tuple[Path, str]]:
    """Checkpoints of a run, each with its folder in the repository; the newest whole one comes last."""
    from core.checkpoint import checkpoints
    from core.outputs import checkpoint_of, find_run

    run = find_run(where, store)
    newest = checkpoint_of(run)
    if every:
        yield from ((path, path.name) for path in reversed(checkpoints(run / "checkpoints")))
    yield newest, inside


def _is_export(folder: Path) -> bool:
    """Whether there are weights in the folder, and it is no run."""
    is_run = (folder / "run.json").is_file() or (folder / "checkpoints").is_dir()
    return folder.is_dir() and not is_run and any(_files(folder, "*.safetensors"))


def _files(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """Files below the folder, without hidden ones and without links that lead out of it."""
    root = folder.resolve()
    for path in sorted(folder.rglob(pattern)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.resolve().is_relative_to(root):
            yield path


def _pushed(hub: Hub, what: Path, place: str, raw: bool) -> str:
    """Push one folder or checkpoint. Returns the commit's address."""
    if not (what / "state.json").is_file():
        run = what.resolve().parent
        return _upload(hub, what, About(what, run if (run / "run.json").is_file() else None, None, None, place))
    run = what.resolve().parents[1]
    found = STEP.fullmatch(what.name)
    (run / FOLDER).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-", dir=run / FOLDER) as export:
        from core.verbs.weights import write_export

        averaged = write_export(what, Path(export), raw=raw)
        return _upload(hub, Path(export), About(Path(export), run, int(found[1]) if found else None, averaged, place))


def _upload(hub: Hub, folder: Path, about: About) -> str:
    """The folder's files below its place, and the card with its samples at the root, in one commit."""
    below = f"{about.place}/" if about.place else ""
    files: dict[str, Path | bytes] = {f"{below}{path.relative_to(folder).as_posix()}": path for path in _files(folder)}
    shown = samples_of(about)
    files |= {f"samples/{path.name}": path for path in shown}
    files["README.md"] = card(about, hub.repo, shown).encode()
    step = f"step {about.step}" if about.step is not None else "export"
    return hub.upload(files, f"{below}{step}: weights and card")
