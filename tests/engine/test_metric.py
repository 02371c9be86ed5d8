"""The recipe's own metric: scored at the end of a run on the captions that the clips were made from, and logged."""

import shutil

import pytest
import torch
from mlflow import MlflowClient

from core.distributed import Ranks
from core.errors import UserError
from core.preflight import preflight
from core.slots import ColourAndMotion
from core.validate import frechet, metric, prompts_of, real_clips
from registry import get
from tests.engine.running import journal, run_here, short

NAME = "lvdm-text2video-tiny"
SCORES = {
    f"val/{attribute}_score{which}"
    for attribute in ("colour", "direction", "speed")
    for which in ("", "_real", "_shuffled", "_mean_clip")
}


def test_a_run_ends_with_every_score_beside_its_baselines_in_journal_and_mlflow(sky, store, tmp_path):
    recipe = short(NAME, sky, "--max-steps 1 --validation.metric-clips 8")
    result = run_here(recipe, tmp_path / "run", store)
    last = {name: value for line in journal(result.output_dir) for name, value in line.items()}
    assert last.keys() >= SCORES and all(0.0 <= last[name] <= 1.0 for name in SCORES)
    assert last["val/colour_score_real"] == last["val/direction_score_real"] == last["val/speed_score_real"] == 1.0
    logged = MlflowClient(tracking_uri=store).get_run(result.run_id).data.metrics
    assert {name: logged[name] for name in SCORES} == {name: last[name] for name in SCORES}
    assert result.metrics.keys() >= SCORES


def test_real_clips_of_the_prompts_score_full_marks(sky):
    recipe = short(NAME, sky)
    held_out = recipe.validation_data.build()
    prompts = prompts_of(recipe, held_out, 4, Ranks(torch.device("cpu"), 0, 1, None))
    found = metric(real_clips(held_out, 4), prompts, held_out, recipe)
    assert found["val/colour_score"] == found["val/direction_score"] == found["val/speed_score"] == 1.0


def test_a_single_held_out_clip_has_no_distance_and_is_said(sky, tmp_path):
    """A folder of a few videos holds out one; its run ends as any other."""
    recipe = short(NAME, sky)
    training = recipe.data.build()
    shutil.copy(next((sky.parent / "clouds").rglob("*.mp4")), tmp_path)
    alone = recipe.data.but(root=tmp_path, split="all").build()
    assert frechet(real_clips(training, 4), training, alone, recipe) == {"val/frechet_clips": 1.0}
    assert "val/frechet" in frechet(real_clips(training, 4), training, training, recipe)


def test_a_recipe_without_a_metric_has_no_scores(sky):
    recipe = short("lvdm-short-sky-tiny", sky)
    assert metric(torch.zeros(8, 3, 4, 8, 8), [""] * 8, None, recipe) == {}


def test_a_metric_of_captions_is_refused_where_the_recipe_is_told_no_text(sky):
    recipe = get("lvdm-short-sky-tiny")
    with pytest.raises(UserError, match=r"validation.metric: lvdm-short-sky-tiny is told no text"):
        preflight(recipe.but(validation=recipe.validation.but(metric=ColourAndMotion())))
