"""Pictures of MLflow's page, by a headless Chromium from a real server: `python -m tests.tracking.screenshots STORE FOLDER`.

The README's were made of three runs of the sky twin, one of them killed and resumed, with `make screenshots`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tests.tracking.servers import end_with_parent, free_port, wait_for

ROOT = Path(__file__).parents[2]
PATIENCE = 60_000
"""Milliseconds of the page's own time, which stands still while it waits for the server."""
SHOTS = (
    ("mlflow-runs", "runs with what differs", (1500, 480)),
    ("mlflow-samples", "samples side by side", (1500, 1440)),
)
"""File, the address that `registry ui` prints behind these words, size in pixels."""


def chromium() -> str | None:
    """The browser, if there is one (Debian: apt install chromium)."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def page(store: str) -> Iterator[dict[str, str]]:
    """`registry ui` over a store: the addresses that it prints, by the words before them.

    Over IPv6, because MLflow opens a panel for an assistant over a third of every page that 127.0.0.1 serves.
    """
    port = free_port()
    words = [sys.executable, "-m", "registry", "ui", "--store", store, "--host", "::1", "--port", str(port)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        alone = {"start_new_session": True, "preexec_fn": end_with_parent}
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=said, stderr=said, **alone)
        try:
            wait_for(f"http://[::1]:{port}/health", process)
            said.seek(0)
            yield dict(re.findall(r"^ +(\S.*?)  +(http\S+)$", said.read(), re.M))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def browse(url: str, *options: str) -> str:
    """What Chromium prints."""
    browser = chromium()
    assert browser
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--virtual-time-budget={PATIENCE}", *options, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def shoot(url: str, path: Path, size: tuple[int, int]) -> Path:
    """The page as a PNG of 256 colours."""
    browse(url, f"--window-size={size[0]},{size[1]}", f"--screenshot={path}")
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    return path


def main(store: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with page(store) as addresses:
        return [shoot(addresses[words], (folder / f"{name}.png").absolute(), size) for name, words, size in SHOTS]


if __name__ == "__main__":
    if chromium() is None:
        raise SystemExit("no Chromium here; on Debian: apt install chromium")
    print("\n".join(map(str, main(sys.argv[1], Path(sys.argv[2])))))
