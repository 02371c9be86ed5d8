"""MLflow's page in a real browser: runs with their delta, samples of runs side by side."""

import html
import re

import pytest
from PIL import Image

from registry import get
from tests.tracking.running import everything, opened, picture, runs_of
from tests.tracking.screenshots import SHOTS, browse, chromium, page, shoot

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium here (Debian: apt install chromium)")


def test_the_page_shows_names_deltas_models_and_the_samples_of_all_runs_at_the_newest_step(tmp_path, store):
    for name, flags in (("first", "--lr 1e-3"), ("second", "--optim.ema=None --seed 7")):
        tracker = opened(tmp_path / name, store, get(f"lvdm-short-sky-tiny {flags}"), name)
        everything(tracker)
        for cell in range(4):
            picture(tracker, 75, cell)
        tracker.close("FINISHED")
    colors = [run.data.tags["mlflow.runColor"] for run in runs_of(store)]
    assert len(set(colors)) == 2
    with page(store) as addresses:
        texts = {}
        for name, words, size in SHOTS:
            path = shoot(addresses[words], tmp_path / f"{name}.png", size)
            with Image.open(path) as image:
                assert image.size == size and len(image.getcolors(256)) > 20
            assert path.stat().st_size < 300_000
            dom = browse(addresses[words], f"--window-size={size[0]},{size[1]}", "--dump-dom")
            texts[name] = html.unescape(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", dom, flags=re.S)), dom
    runs, _ = texts["mlflow-runs"]
    for shown in ("first", "second", "--lr 0.001", "--optim.ema=None --seed 7", "recipe.delta", "val/loss"):
        assert shown in runs, shown
    samples, dom = texts["mlflow-samples"]
    assert all(f"samples/{cell}" in samples for cell in range(4)) and "No image" not in samples
    assert len(re.findall(r"<img[^>]+images%2Fsamples|<img[^>]+get-artifact|<img[^>]+blob:", dom)) >= 8
