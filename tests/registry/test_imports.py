"""Who imports whom, and that the light verbs stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "mlflow", "diffusers", "transformers", "numpy", "av", "PIL", "pyarrow"}


def imported(file: Path) -> set[str]:
    """Absolute names of everything that a file imports, anywhere in it; `from a import b` gives `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = file.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def test_core_imports_neither_data_nor_recipes_nor_the_registry():
    wrong = {(f.name, n) for f in files("core") for n in imported(f) if within(n, "data", "recipes", "registry")}
    assert wrong == set()


def test_data_imports_of_core_only_slots_errors_and_hashing():
    allowed = ("core.slots", "core.errors", "core.hashing")
    names = {(f.name, n) for f in files("data") for n in imported(f) if within(n, "core", "recipes", "registry")}
    assert {(f, n) for f, n in names if not within(n, *allowed)} == set()


def test_recipes_import_only_slots_and_the_standard_library():
    names = {(f.name, n) for f in files("recipes") for n in imported(f)}
    ours = {(f, n) for f, n in names if n.partition(".")[0] not in sys.stdlib_module_names}
    assert {(f, n) for f, n in ours if not within(n, "core.slots", "data.slots", "recipes")} == set()


def test_the_slots_import_only_each_other_errors_and_the_standard_library_at_the_top():
    for file in [*files("core/slots"), ROOT / "data/slots.py", ROOT / "data/bucketed_slots.py"]:
        tree = ast.parse(file.read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in top}
        outside = {n for n in names if n.partition(".")[0] not in sys.stdlib_module_names}
        assert {n for n in outside if not within(n, "core.slots", "core.errors", "data.bucketed_slots")} == set(), file


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import registry; registry.names()", HEAVY | {"tyro", "rich"}),
        ("import registry; registry.get('lvdm-short-sky', '--lr', '1e-4')", HEAVY),
        ("import registry; registry.main(['list'])", HEAVY | {"tyro", "rich"}),
        ("import registry; registry.main(['show', 'lvdm-short-sky'])", HEAVY | {"tyro", "rich"}),
        ("import registry; registry.main(['diff', 'lvdm-short-sky', 'lvdm-short-sky-tiny'])", HEAVY | {"tyro", "rich"}),
        (
            "import registry; registry.main(['diff', 'lvdm-short-sky', 'lvdm-video-vae', '--as', 'recipe'])",
            HEAVY | {"tyro", "rich"},
        ),
        ("import registry; registry.main(['show', 'lvdm-short-sky', '--origin'])", HEAVY | {"tyro", "rich"}),
        ("import registry; registry.main(['list', 'sky', '--where', 'optim.lr<1'])", HEAVY | {"tyro", "rich"}),
        ("import registry; registry.main(['run', 'lvdm-short-sky', '--help'])", HEAVY),
        ("import registry; registry.main(['weights', 'import', 'x', '--too', 'y'])", HEAVY),
        ("import registry; registry.main(['weights', 'export', '--help'])", HEAVY),
        ("import registry; registry.main(['--version'])", HEAVY | {"tyro", "recipes", "core.slots"}),
    ],
)
def test_what_only_reads_recipes_imports_nothing_heavy(code, absent):
    assert modules_after(code) & absent == set()
