"""`sample` and `measure-latents` on a real run."""

import json

import av
import numpy as np
import pytest

from core.errors import UserError
from core.validate import real_clips
from core.verbs.measure import measure_latents
from core.verbs.sample import sample
from tests.engine.running import run_here, short


@pytest.fixture(scope="module")
def run(sky, _migrated_store, tmp_path_factory):
    """A run of the sky twin long enough that its average is not its raw weights."""
    folder = tmp_path_factory.mktemp("sampled")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    return run_here(short("lvdm-short-sky-tiny", sky, "--lr 1e-2"), folder / "run", store), store


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(int)


def test_the_same_seed_gives_the_same_clip_whatever_else_is_sampled(run, tmp_path):
    out = run[0].output_dir
    many = sample(str(out), num=3, seed=5, output_dir=tmp_path / "many", device="cpu")
    one = sample(f"run:{run[0].run_id}", num=1, seed=5, output_dir=tmp_path / "one", device="cpu", store=run[1])
    other = sample(str(out), num=1, seed=6, output_dir=tmp_path / "other", device="cpu")
    # the codec adds a level or two to a difference of one
    assert np.abs(frames(many / "clip-000.mp4") - frames(one / "clip-000.mp4")).max() <= 4
    assert np.abs(frames(one / "clip-000.mp4") - frames(other / "clip-000.mp4")).mean() > 4
    assert sorted(p.name for p in many.iterdir()) == [
        "clip-000.mp4", "clip-001.mp4", "clip-002.mp4", "grid.gif", "samples.json", "sheet.png",
    ]  # fmt: skip
    assert json.loads((many / "samples.json").read_text())["averaged"] is True


def test_raw_weights_are_others_than_the_average(run, tmp_path):
    out = str(run[0].output_dir)
    averaged = frames(sample(out, num=1, output_dir=tmp_path / "a", device="cpu") / "clip-000.mp4")
    raw = frames(sample(out, num=1, output_dir=tmp_path / "r", device="cpu", raw=True) / "clip-000.mp4")
    assert not np.array_equal(averaged, raw)


def test_an_autoencoder_makes_no_samples_and_says_so(sky, store, tmp_path):
    out = run_here(short("lvdm-video-vae-tiny", sky, "--max-steps 1"), tmp_path / "vae", store).output_dir
    with pytest.raises(UserError, match="no generative recipe"):
        sample(str(out), num=1, device="cpu")


def test_measured_constants_give_latents_of_mean_zero_and_deviation_one(sky, store, tmp_path):
    out = run_here(short("lvdm-video-vae-tiny", sky, "--max-steps 3"), tmp_path / "vae", store).output_dir
    recipe = short("lvdm-short-sky-tiny", sky)
    constants = measure_latents(recipe, clips=6, weights=str(out), device="cpu", write=True)
    stored = json.loads((out / "export" / "vae" / "config.json").read_text())
    assert {k: stored[k] for k in constants} == constants
    vae = recipe.system.autoencoder.build()
    from core.weights.load import load_component

    load_component(vae, str(out), "vae")
    mean = vae.encode(real_clips(recipe.data.build(), 6)).mean
    latents = constants["scale_factor"] * (mean + constants["shift_factor"])
    # the noise of the posterior is part of what was measured: the means alone vary less
    assert abs(latents.mean()) < 0.1 and 0.05 < latents.std() <= 1.05
