"""Recipes of other packages: a real second distribution beside this project, seen by a real command."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RECIPE = '''
from core.slots import Loop
from recipes.lvdm import LVDMShortSkyTiny
from registry import Recipe, register


@register("{name}")
class {cls}(LVDMShortSkyTiny):
    """Sky from another package."""

    loop: Loop = Loop(max_steps=77)


assert issubclass({cls}, Recipe)
'''


def install(site: Path, package: str, module: str, source: str) -> None:
    """What pip leaves in site-packages: a module, and a dist-info with an entry point."""
    (site / f"{module}.py").write_text(source)
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[video_registry.recipes]\nmain = {module}\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path


def command(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": f"{ROOT}:{site}", "PATH": ""}
    return subprocess.run([sys.executable, "-m", "registry", *words], cwd=site, env=env, capture_output=True, text=True)


def test_the_recipe_of_an_installed_package_is_listed_shown_and_overridden(site):
    install(site, "sky-extras", "sky_extras", RECIPE.format(name="elsewhere-sky", cls="Elsewhere"))
    listed = command(site, "list")
    assert listed.returncode == 0 and listed.stderr == ""
    assert "elsewhere-sky" in listed.stdout and "lvdm-short-sky" in listed.stdout
    shown = command(site, "show", "elsewhere-sky", "--seed", "5")
    fields = [line.split() for line in shown.stdout.splitlines()]
    assert ["max_steps", "77"] in fields and ["seed", "5"] in fields
    assert "sky_extras.Elsewhere" in shown.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit('away')", "SystemExit: away"),
        (RECIPE.format(name="half-made", cls="HalfMade") + "\nraise OSError('two\\nlines')", "OSError: two lines"),
    ],
)
def test_a_broken_package_is_left_out_with_one_line_and_harms_no_other(site, source, reason):
    install(site, "broken-one", "a_broken_one", source)
    install(site, "sky-extras", "sky_extras", RECIPE.format(name="elsewhere-sky", cls="Elsewhere"))
    done = command(site, "list")
    assert done.returncode == 0
    assert "elsewhere-sky" in done.stdout and "half-made" not in done.stdout
    assert done.stderr.startswith("warning: the recipes of package 'broken-one' are left out: a_broken_one fails with")
    assert done.stderr.count("\n") == 1 and reason in done.stderr


@pytest.mark.parametrize(
    ("name", "cls", "said"),
    [
        (
            "lvdm-short-sky",
            "Mine",
            "two recipes are called 'lvdm-short-sky': recipes.lvdm.LVDMShortSky and sky_extras.Mine",
        ),
        ("mine", "LVDMShortSky", "two slot classes are called LVDMShortSky: recipes.lvdm and sky_extras"),
    ],
)
def test_a_name_that_is_taken_is_an_error_that_names_both(site, name, cls, said):
    install(site, "sky-extras", "sky_extras", RECIPE.format(name=name, cls=cls))
    done = command(site, "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: package 'sky-extras': ") and said in done.stderr and done.stderr.count("\n") == 1
    )
