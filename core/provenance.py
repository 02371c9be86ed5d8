"""What a run was: code, command, recipe, machine and packages, so that it can be judged and repeated. Secrets are left
out of all of it.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import inspect
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.recipe_file import delta_flags, recipe_hash
from core.redact import HIDDEN, has_secret, redact
from core.slots import Recipe
from core.slots.recipe import RECIPES
from core.slots.slot import flatten

PATCH_LIMIT = 2_000_000
"""Characters of an uncommitted patch that are kept. Code is far below; a data file that was added by mistake is not."""
FOLDER = "provenance"


def command_line(argv: Sequence[str]) -> str:
    """The words after the program's name as a command; empty for a run from Python."""
    return redact(shlex.join(["python", "-m", "registry", *argv])) if argv else ""


def tags(recipe: Recipe, output_dir: Path, command: str, device: str) -> dict[str, str]:
    """The tags of a run that begins, or goes on, in this process; `command` is the one that it began with."""
    delta = recipe_delta(recipe)
    return {
        "recipe": recipe.name,
        "recipe.delta": delta,
        "recipe.hash": recipe_hash(recipe),
        "command": command,
        "output_dir": str(output_dir.absolute()),
        "device": device,
        "versions": json.dumps(versions()),
        "mlflow.note.content": note(recipe, delta, command, output_dir),
        "mlflow.user": _user(),
        "mlflow.source.name": command or "python",
        "mlflow.source.type": "LOCAL",
    } | process()


def note(recipe: Recipe, delta: str, command: str, output_dir: Path) -> str:
    """The description on the run's page, in Markdown."""
    about = (inspect.getdoc(type(recipe)) or "").strip()
    changed = f"`{recipe.name}` with `{delta}`" if delta else f"`{recipe.name}` as it is registered"
    lines = [about, f"**Recipe** {changed}, hash `{recipe_hash(recipe)[:16]}`"]
    if command:
        lines.append(f"**Command** `{command}`")
    return "\n\n".join([*lines, f"**Files** `{output_dir.absolute()}`"])


def recipe_delta(recipe: Recipe) -> str:
    """The shortest flags that lead from the registered recipe of this name to `recipe`; empty where there is none."""
    cls: Any = RECIPES.get(recipe.name)
    if cls is None:
        return ""
    base = cls()
    try:
        return shlex.join(delta_flags(recipe, base))
    except UserError:  # one of the few values that no flag can say
        a, b = flatten(base), flatten(recipe)
        return ", ".join(f"{k}={b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))


def refuse_secrets(recipe: Recipe) -> None:
    """Raise UserError for a recipe that holds a secret: recipes are written, logged and compared as they are."""
    for path, value in flatten(recipe).items():
        for item in value if isinstance(value, tuple) else (value,):
            if has_secret(str(item)):
                raise UserError(
                    f"{path} = {redact(str(item))}: this looks like a secret ({HIDDEN}), and a recipe is written to "
                    "disk and to MLflow as it is. Keep secrets in environment variables"
                )


# ------------------------------------------------------------------------------------------------------------- machine


def process() -> dict[str, str]:
    """Which process this is, so that `doctor` can say whether it still lives."""
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "process.boot": boot_id(),
        "process.started": started(os.getpid()),
        "process.namespace": namespace(),
    }


def boot_id() -> str:
    """What the kernel calls this boot of the machine; empty where it has no name."""
    return _line(Path("/proc/sys/kernel/random/boot_id"))


def started(pid: int) -> str:
    """When a process was started, in clock ticks since boot: a pid is used again, both are not. Empty: gone."""
    stat = _line(Path(f"/proc/{pid}/stat"))  # the name, in brackets, may hold blanks: field 22 is the 20th behind it
    fields = stat.rpartition(")")[2].split()
    return "" if len(fields) < 20 or fields[0] in ("Z", "X") else fields[19]


def namespace() -> str:
    """The process namespace: a container has its own pids."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  # no path, a name like pid:[4026531836]
    except OSError:
        return ""


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for this user
        return str(os.getuid())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "torchvision", "diffusers", "transformers", "mlflow", "numpy", "xformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def environment() -> str:
    """Every installed package with its version, a line each, below Python, platform and the CUDA that torch has."""
    packages = sorted(set(_packages()), key=str.lower)
    head = [f"# Python {platform.python_version()} ({sys.executable})", f"# {platform.platform()}"]
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        head.append(f"# CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    return "\n".join([*head, *packages]) + "\n"


def _packages() -> Iterator[str]:
    for each in metadata.distributions():
        try:
            yield f"{each.metadata['Name']}=={each.version}"
        except (KeyError, TypeError, OSError, metadata.PackageNotFoundError) as error:  # half of it was removed
            yield f"# a package without metadata: {type(error).__name__}"


# ---------------------------------------------------------------------------------------------------------------- code


def code() -> tuple[dict[str, str], str]:
    """Tags about the checkout that runs, and what is not committed in it. Nothing outside a checkout."""
    root = Path(__file__).parents[1]
    try:
        if not _git(root, "ls-files", "core/provenance.py"):  # installed, or inside another project's checkout
            return {}, ""
        commit, patch = _git(root, "rev-parse", "HEAD").strip(), _patch(root)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"git could not be asked for the commit ({error}); the run has no commit tag", file=sys.stderr)
        return {}, ""
    found = {"mlflow.source.git.commit": commit, "git.dirty": str(bool(patch))}
    if patch:
        found["git.patch"] = hashlib.sha256(patch.encode()).hexdigest()
    return found, patch


def _patch(root: Path) -> str:
    """`git diff HEAD`, below a line for every Python file that git does not know (`git apply` passes them over)."""
    unknown = _git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py").splitlines()
    changed = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv")
    return "".join(f"# not in git: {name}\n" for name in unknown) + changed


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=", "-c", "core.quotepath=off", *words]
    done = subprocess.run(command, capture_output=True, timeout=20)
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


# --------------------------------------------------------------------------------------------------------------- files


def write_files(output_dir: Path, patch: str) -> list[Path]:
    """The environment and the patch as files in the run's directory. One that is there already is not written again."""
    texts = {"environment.txt": environment()}
    if len(patch) > PATCH_LIMIT:
        patch = patch[:PATCH_LIMIT] + f"\n# cut: the patch has {len(patch):,} characters\n"
    if patch:
        texts["uncommitted.patch"] = patch
    return [_keep(output_dir / FOLDER / name, redact(text)) for name, text in texts.items()]


def _keep(path: Path, text: str) -> Path:
    """Write `path`, or `<stem>-2`, `-3` … where a start of the run before this one had another text."""
    number, target = 1, path
    while target.is_file() and target.read_text() != text:
        number += 1
        target = path.with_stem(f"{path.stem}-{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target
