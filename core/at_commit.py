"""The recipe as it stood at a commit: its code is run in a process of its own, from a copy that is thrown away."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from core.errors import UserError
from core.recipe_file import load
from core.slots.recipe import Recipe

ROOT = Path(__file__).parents[1]
PARTS = ("registry.py", "core/__init__.py", "data/__init__.py", "recipes/__init__.py")
"""What a commit must have: where one is missing, Python would take an installed one."""
SECONDS = 120
"""For the process that shows the recipe; on an idle machine it takes less than one."""
OTHERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "PYTHONPATH", "PYTHONSAFEPATH")
"""Variables that would lead git or Python to another checkout."""


def recipe_at(text: str, root: Path = ROOT) -> Recipe:
    """The recipe that `NAME@REVISION [flags]` names, of the git checkout at `root`.

    Raises UserError where there is no such commit, or its code does not say what the recipe is.
    """
    try:
        head, *flags = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r} cannot be read as a recipe at a commit and flags: {error}") from None
    name, _, revision = head.partition("@")
    commit = _git(root, head, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    archive = _git(root, head, "archive", "--format=tar", commit, "--", "*.py")
    with tempfile.TemporaryDirectory(prefix="registry-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        for part in PARTS:
            if not (Path(folder) / part).is_file():
                raise UserError(f"{head}: commit {commit[:10]} has no {part}, so no registry that can be asked")
        shown = _shown(Path(folder), head, commit[:10], ["show", name, *flags, "--json"])
    return load(shown, head)


def _git(root: Path, head: str, *words: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, env=_environment())
    except OSError as error:
        raise UserError(f"{head}: git cannot be run ({error})") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
        raise UserError(f"{head}: git finds no such commit of this project: {lines[0].removeprefix('fatal: ')}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OTHERS}


def _shown(folder: Path, head: str, commit: str, words: list[str]) -> str:
    """What the registry of that commit answers."""
    command = [sys.executable, "-m", "registry", *words]
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment(), capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{head}: the code of commit {commit} gives no answer in {SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{head}: the code of commit {commit} does not show it: {lines[-1].removeprefix('error: ')}")
    return done.stdout
