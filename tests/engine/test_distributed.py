"""Two processes over gloo: the losses and weights of one."""

import json

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from core.errors import UserError
from core.slots import Parallel
from tests.engine.running import TWINS, flags, losses, registry

LENGTH = "--max-steps 4"


def exported(out):
    file = next((out / "export").glob("*/diffusion_pytorch_model.safetensors"))
    return load_file(file)


@pytest.mark.parametrize("name", TWINS)
def test_two_processes_replicated_or_sharded_give_the_losses_and_weights_of_one(sky, store, tmp_path, name):
    runs = {}
    for key, nproc, more in (("one", 0, ""), ("replicated", 2, ""), ("sharded", 2, "--parallel.shard 2")):
        words = flags(name, sky, f"{LENGTH} --batch-size 1 {more}")
        done = registry("run", *words, "--output-dir", str(tmp_path / key), "--store", store, cwd=tmp_path, nproc=nproc)
        assert done.returncode == 0, done.stderr[-2000:]
        runs[key] = tmp_path / key
    for key in ("replicated", "sharded"):
        assert losses(runs[key]) == pytest.approx(losses(runs["one"]), rel=1e-4)
        mine, reference = exported(runs[key]), exported(runs["one"])
        assert mine.keys() == reference.keys()
        # AdamW divides by the root of tiny second moments, so rounding shows at the size of a step, not of a weight
        worst = max((mine[k] - reference[k]).abs().max().item() for k in mine)
        assert worst < 1e-3
    found = MlflowClient(tracking_uri=store).search_experiments()
    runs_in_store = MlflowClient(tracking_uri=store).search_runs([e.experiment_id for e in found])
    assert len(runs_in_store) == 3 and {r.info.status for r in runs_in_store} == {"FINISHED"}


def test_nproc_starts_the_processes_itself_and_rank_0_alone_talks(sky, store, tmp_path):
    words = flags("lvdm-short-sky-tiny", sky, f"{LENGTH} --batch-size 1")
    done = registry(
        "run", *words, "--nproc", "2", "--output-dir", str(tmp_path / "run"), "--store", store, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("from step 0 of 4, 2 x cpu") == 1 and done.stdout.count("finished at step 4") == 1
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4}
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"] == "lvdm-short-sky-tiny"


def test_a_batch_that_does_not_divide_over_the_ranks_is_one_line_that_says_what_fits(sky, store, tmp_path):
    words = flags("lvdm-short-sky-tiny", sky, "--global-batch 4 --batch-size 4")
    done = registry("run", *words, "--output-dir", str(tmp_path / "run"), "--store", store, cwd=tmp_path, nproc=2)
    assert done.returncode != 0
    assert "does not divide over 2 ranks x micro_batch 4: --batch-size 1 or 2 fits" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_says_which_numbers_would():
    assert Parallel().mesh(4) == (4, 1, 1) and Parallel().mesh(1) == (1, 1, 1)
    assert Parallel(shard=2).mesh(4) == (2, 2, 1) and Parallel(shard=2, sequence=2).mesh(8) == (2, 2, 2)
    assert Parallel(replicate=2, shard=None).mesh(8) == (2, 4, 1) and Parallel(shard=None).mesh(4) == (1, 4, 1)
    with pytest.raises(UserError, match=r"needs 6 ranks, there are 4; what fits: 4 x 1 x 1, 2 x 2 x 1, 1 x 4 x 1"):
        Parallel(replicate=3, shard=2).mesh(4)
    with pytest.raises(UserError, match=r"there are 8; what fits: 4 x 1 x 2, 2 x 2 x 2, 1 x 4 x 2"):
        Parallel(replicate=3, sequence=2).mesh(8)
