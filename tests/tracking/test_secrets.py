"""No secret is written: planted where people leave them, looked for in every byte of the run and of the store."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from core.run_facts import run_facts
from tests.tracking.conftest import PASSWORD

ROOT = Path(__file__).parents[2]
HUB = "hf_" + "PlantedHubTokenOfATest"
AWS = "planted/aws+secret+of+a+test"
HEADER = "planted.bearer.of.a.test"
IN_PATCH = "AKIA" + "PLANTEDPLANTED12"
IN_TAG = "planted-value-of-a-tag"
IN_ERROR = "planted-in-an-exception"
SECRETS = (HUB, AWS, HEADER, IN_PATCH, IN_TAG, IN_ERROR, PASSWORD)

RUN = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from core.report import Report
from registry import get
from tests.tracking.running import everything, opened
out, store = Path(sys.argv[1]), sys.argv[2]
words = ["run", "lvdm-short-sky-tiny", "--store", store, "--hub-token", os.environ["PLANTED"], "--init-from", "https://bob:" + os.environ["PLANTED"] + "@host/w"]
tracker = opened(out, store, argv=words)
everything(tracker)
tracker.tags({"hub.token": os.environ["PLANTED"], "said": "Authorization: Bearer " + os.environ["HEADER"]})
first = SimpleNamespace(first=True, world=1, device=SimpleNamespace(type="cpu"))
report = Report(get("lvdm-short-sky-tiny"), SimpleNamespace(start=SimpleNamespace(folder=out, notes=())), first, tracker, "", None)
report.begin(0, 3)
report.bar.line("reading s3://x?token=" + os.environ["PLANTED"])
try:
    raise ConnectionError(f"GET https://bob:{os.environ['IN_ERROR']}@host/x?X-Amz-Signature={os.environ['PLANTED']} with {os.environ['HF_TOKEN']}")
except ConnectionError as error:
    report.close("FAILED", error)
print(tracker.run_id)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git checkout of this project with a key in an uncommitted change."""
    root = tmp_path / "checkout"
    for name in ("core", "data", "recipes", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copy(ROOT / "registry.py", root)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    with (root / "core" / "errors.py").open("a") as file:
        file.write(f'\nAWS_KEY = "{IN_PATCH}"\nCHANGED = True\n')
    (root / "mine.py").write_text("print(1)\n")
    return root


def test_no_planted_secret_is_in_the_files_of_a_run_in_the_store_or_in_what_was_printed(checkout, tmp_path, guarded):
    address, served = guarded
    store = address.replace("//", f"//admin:{PASSWORD}@")
    out = tmp_path / "run"
    planted = {"HF_TOKEN": HUB, "AWS_SECRET_ACCESS_KEY": AWS, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    hidden = {"PLANTED": IN_TAG, "HEADER": HEADER, "IN_ERROR": IN_ERROR}  # these names say nothing
    env = os.environ | planted | hidden | {"PYTHONPATH": str(checkout), "AWS_NOTE": AWS}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(out), store], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.split()[-1]
    assert run_facts(out)["run_id"] == run_id
    run = MlflowClient(tracking_uri=store).get_run(run_id)

    # the run is whole: what held the secrets is there, without them
    assert run.info.status == "FAILED" and "--hub-token ***" in run.data.tags["command"]
    assert run.data.tags["hub.token"] == "***" and run.data.tags["said"] == "Authorization: Bearer ***"
    assert "ConnectionError: GET https://bob:***@host" in run.data.tags["error"]
    patch = (out / "provenance" / "uncommitted.patch").read_text()
    assert "+CHANGED = True" in patch and '+AWS_KEY = "***"' in patch and "# not in git: mine.py" in patch
    assert len(run.data.tags["git.patch"]) == 64 and run.data.tags["git.dirty"] == "True"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert "bob:***@host" in (out / "traceback.txt").read_text() and "token=***" in (out / "run.log").read_text()

    places = [*files(out), *(file for file in files(served) if file.name not in ("auth.ini", "auth.db"))]
    assert len([file for file in places if file.is_relative_to(served / "art")]) > 5
    found = [(file, secret) for file in places for secret in SECRETS if secret.encode() in file.read_bytes()]
    assert found == []
    assert [secret for secret in SECRETS if secret in done.stderr + done.stdout] == []


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_the_patch_applies_to_the_commit_that_the_run_names(checkout, tmp_path, store):
    (checkout / "core" / "errors.py").write_text(
        (checkout / "core" / "errors.py").read_text().replace(IN_PATCH, "none")
    )
    code = "from core.provenance import code; import sys; tags, patch = code(); sys.stdout.write(patch)"
    patch = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout
    git = ["git", "-C", str(checkout)]
    subprocess.run([*git, "stash", "-q"], check=True)
    subprocess.run([*git, "apply", "-"], input=patch, text=True, check=True)
    assert 'AWS_KEY = "none"' in (checkout / "core" / "errors.py").read_text()


def test_an_installed_copy_inside_another_checkout_does_not_claim_its_commit(tmp_path):
    root = tmp_path / "other"
    root.mkdir()
    subprocess.run(["git", "-C", str(root), "init", "-q"], check=True)
    shutil.copytree(ROOT / "core", root / "lib" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "from core.provenance import code; print(code())"],
        cwd=root / "lib",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "({}, '')"
