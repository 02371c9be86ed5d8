"""Every resolved recipe as text, so that a changed default shows in review. `python -m tests.golden_recipes` rewrites them."""

from pathlib import Path

import registry
from core.verbs.show import text

FOLDER = Path(__file__).parent


def own_names() -> list[str]:
    """The recipes of this project, without those of installed packages."""
    return [name for name in registry.names() if type(registry.get(name)).__module__.startswith("recipes.")]


def rewrite() -> list[Path]:
    """Write the text of every recipe, and delete those of recipes that are gone. Returns what changed."""
    wanted = {FOLDER / f"{name}.txt": text(registry.get(name)) for name in own_names()}
    gone = [path for path in FOLDER.glob("*.txt") if path not in wanted]
    changed = [path for path, new in wanted.items() if not path.exists() or path.read_text() != new]
    for path in gone:
        path.unlink()
    for path in changed:
        path.write_text(wanted[path])
    return gone + changed
