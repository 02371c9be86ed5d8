"""Two processes over gloo: the losses and weights of one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from core.errors import UserError
from core.slots import Parallel
from core.verbs.run import descendants
from tests.engine.processes import run_ranks, start_words
from tests.engine.running import REPO, TWINS, flags, losses, registry, short
from tests.tracking.servers import free_port

LENGTH = "--max-steps 3"
MANY = 40
"""Updates, so many that a busy machine sees the first ones before the last."""


def exported(out):
    """The tensors of all networks."""
    files = (out / "export").glob("*/*.safetensors")
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def configs(out):
    """The configurations of all networks."""
    return {file.parent.name: json.loads(file.read_text()) for file in (out / "export").glob("*/*config.json")}


KINDS = {
    "replicated": "--parallel.shard 1",
    "sharded": "--parallel.shard 2 --parallel.shard-frozen-from 0",
    "offloaded": "--parallel.shard 2 --parallel.offload True",
}


@pytest.mark.parametrize("name", TWINS)
def test_two_processes_replicated_or_sharded_give_the_losses_and_weights_of_one(sky, store, tmp_path, name):
    recipe = short(name, sky, f"{LENGTH} --batch-size 1")
    one = run_ranks(recipe, 1, tmp_path / "one", store)
    for kind in ("replicated", "sharded"):
        two = run_ranks(short(name, sky, f"{LENGTH} --batch-size 1 {KINDS[kind]}"), 2, tmp_path / kind, store)
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        mine, reference = exported(two), exported(one)
        assert mine.keys() == reference.keys() and configs(two) == configs(one)
        for key in mine:
            assert torch.allclose(mine[key], reference[key], atol=1e-5), (kind, key)
    found = MlflowClient(tracking_uri=store).search_experiments()
    runs_in_store = MlflowClient(tracking_uri=store).search_runs([e.experiment_id for e in found])
    assert len(runs_in_store) == 3 and {r.info.status for r in runs_in_store} == {"FINISHED"}


def test_four_ranks_as_two_by_two_and_two_with_offload_give_the_losses_of_one(sky, store, tmp_path):
    name = "lvdm-video-vae-tiny"
    one = run_ranks(short(name, sky, f"{LENGTH} --batch-size 1"), 1, tmp_path / "one", store)
    kinds = (("two machines", 4, 2, "--parallel.shard None"), ("offload", 2, 2, KINDS["offloaded"]))
    for key, world, local, more in kinds:
        out = run_ranks(short(name, sky, f"{LENGTH} --batch-size 1 {more}"), world, tmp_path / key, store, local=local)
        assert losses(out) == pytest.approx(losses(one), rel=1e-5), key


def test_weights_gathered_in_bf16_train_to_about_the_same_losses_and_are_kept_in_fp32(sky, store, tmp_path):
    name, low = "lvdm-video-vae-tiny", "--parallel.shard 2 --parallel.param-dtype bf16"
    one = run_ranks(short(name, sky, f"{LENGTH} --batch-size 1"), 1, tmp_path / "one", store)
    two = run_ranks(short(name, sky, f"{LENGTH} --batch-size 1 {low}"), 2, tmp_path / "two", store)
    assert losses(two) != losses(one) and losses(two) == pytest.approx(losses(one), rel=0.03)
    shards = [load_file(path) for path in two.glob("checkpoints/*/*.safetensors")]
    assert len(shards) == 2 and {t.dtype for shard in shards for t in shard.values()} == {torch.float32}


def test_a_run_goes_on_from_two_ranks_on_one_and_on_two_again_with_the_losses_of_one(sky, store, tmp_path):
    name = "lvdm-video-vae-tiny"
    # at the twin's own rate AdamW makes much of the last bits, and 9 updates are enough to see it
    flat = (
        "--batch-size 1 --lr 1e-4 --optim.schedule.name constant --optim.schedule.warmup-steps 0 --parallel.shard None"
    )
    one = run_ranks(short(name, sky, f"{flat} --max-steps 9"), 1, tmp_path / "one", store)
    for steps, world in ((3, 2), (6, 1), (9, 2)):
        recipe = short(name, sky, f"{flat} --max-steps {steps}")
        run_ranks(recipe, world, tmp_path / "elastic", store, resume="auto")
    assert losses(tmp_path / "elastic") == pytest.approx(losses(one), rel=1e-5)
    numbers = [
        json.loads((out / "checkpoints" / "step-00000009" / "state.json").read_text())
        for out in (one, tmp_path / "elastic")
    ]
    assert [numbers[0][key] == numbers[1][key] for key in ("epoch", "drawn", "samples")] == [True] * 3
    four = run_ranks(short(name, sky, f"{flat} --max-steps 10"), 4, tmp_path / "elastic", store, resume="auto")
    assert losses(four).keys() == set(range(1, 11))


def two_ranks(words, folder, store):
    """Exit code of the first of two ranks of `run WORDS`, and what both said."""
    said, port = folder / "said", free_port()
    words = ["run", *words, "--output-dir", str(folder / "run"), "--store", store, "--device", "cpu"]
    ranks = [start_words(words, said, rank, 2, port) for rank in range(2)]
    for process in ranks:
        process.join(200)
        process.kill()
    return ranks[0].exitcode, said.read_text()


def test_a_recipe_that_cannot_split_its_sequence_says_so(sky, store, tmp_path):
    words = flags("lvdm-short-sky-tiny", sky, "--batch-size 2 --parallel.sequence 2")
    code, said = two_ranks(words, tmp_path, store)
    assert code != 0 and "cannot split the tokens of a sample over ranks" in said


def ranks_of(launcher):
    """Process id of each rank that a launcher has started."""
    found = {}
    for pid in descendants(launcher.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
    return found


def launched(sky, store, out, *more):
    words = flags("lvdm-video-vae-tiny", sky, f"--max-steps {MANY} --batch-size 1 --checkpoint.every 5")
    command = [sys.executable, "-m", "registry", "run", *words, "--nproc", "2", "--output-dir", str(out)]
    variables = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with out.with_suffix(".stderr").open("w") as said:
        return subprocess.Popen([*command, "--store", store, *more], env=variables, cwd=out.parent, stderr=said)


def said_by(out):
    return out.with_suffix(".stderr").read_text()


def wait_for(condition, patience=120.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience
        time.sleep(0.02)


def steps(out):
    return len(losses(out)) if (out / "journal.jsonl").exists() else 0


def test_a_rank_that_is_killed_is_started_again_and_the_losses_are_those_of_an_undisturbed_run(sky, store, tmp_path):
    calm, fire = launched(sky, store, tmp_path / "calm"), tmp_path / "fire"
    assert calm.wait(200) == 0
    hit = launched(sky, store, fire, "--max-restarts", "1")
    wait_for(lambda: steps(fire) >= 8)
    os.kill(ranks_of(hit)[1], signal.SIGKILL)
    assert hit.wait(200) == 0, said_by(fire)[-3000:]
    assert losses(fire) == losses(tmp_path / "calm") and len(losses(fire)) == MANY
    assert "resumed at step" in (fire / "run.log").read_text()


def test_a_rank_that_dies_takes_the_others_down_with_a_clear_line_and_no_hang(sky, store, tmp_path):
    hit = launched(sky, store, tmp_path / "run")
    wait_for(lambda: steps(tmp_path / "run") >= 3)
    os.kill(ranks_of(hit)[1], signal.SIGKILL)
    assert hit.wait(100) != 0
    assert "error: rank 0 of 2 lost rank 1, which died, was killed or hangs" in said_by(tmp_path / "run")
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri=store).get_run(run_id).info.status == "FAILED"


def test_sigterm_to_one_rank_alone_stops_all_of_them_together_with_a_checkpoint(sky, store, tmp_path):
    hit = launched(sky, store, tmp_path / "run")
    wait_for(lambda: steps(tmp_path / "run") >= 3)
    os.kill(ranks_of(hit)[1], signal.SIGTERM)
    hit.wait(100)
    out = tmp_path / "run"
    last = max(losses(out))
    assert last < MANY and (out / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
    run_id = json.loads((out / "run.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri=store).get_run(run_id).info.status == "KILLED"


def test_sigterm_to_the_launcher_reaches_the_ranks_and_its_exit_code_says_so(sky, store, tmp_path):
    hit = launched(sky, store, tmp_path / "run")
    wait_for(lambda: steps(tmp_path / "run") >= 3)
    hit.terminate()
    hit.wait(100)
    last = max(losses(tmp_path / "run"))
    assert hit.returncode == 143 and (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()


def test_nproc_starts_the_processes_itself_and_rank_0_alone_talks(sky, store, tmp_path):
    words = flags("lvdm-short-sky-tiny", sky, f"{LENGTH} --batch-size 1")
    done = registry(
        "run", *words, "--nproc", "2", "--output-dir", str(tmp_path / "run"), "--store", store, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("from step 0 of 3, 2 x cpu") == 1 and done.stdout.count("finished at step 3") == 1
    assert losses(tmp_path / "run").keys() == {1, 2, 3}
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"] == "lvdm-short-sky-tiny"


def test_a_batch_that_does_not_divide_over_the_ranks_is_one_line_that_says_what_fits(sky, store, tmp_path):
    words = flags("lvdm-short-sky-tiny", sky, "--global-batch 4 --batch-size 4")
    code, said = two_ranks(words, tmp_path, store)
    assert code != 0 and "does not divide over 2 ranks x micro_batch 4: --batch-size 1 or 2 fits" in said
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_says_which_numbers_would():
    assert Parallel().mesh(4) == (4, 1, 1) and Parallel().mesh(1) == (1, 1, 1)
    assert Parallel(shard=2).mesh(4) == (2, 2, 1) and Parallel(shard=2, sequence=2).mesh(8) == (2, 2, 2)
    assert Parallel(replicate=2, shard=None).mesh(8) == (2, 4, 1) and Parallel(shard=None).mesh(4) == (1, 4, 1)
    # several machines: shards within one, copies across them
    assert Parallel(shard=None).mesh(16, local=8) == (2, 8, 1) and Parallel(shard=None).mesh(8, local=8) == (1, 8, 1)
    assert Parallel(shard=None, sequence=2).mesh(16, local=8) == (2, 4, 2)
    assert Parallel(shard=None, replicate=1).mesh(16, local=8) == (1, 16, 1) and Parallel().mesh(16, local=8) == (
        16,
        1,
        1,
    )
    with pytest.raises(UserError, match=r"needs 6 ranks, there are 4; what fits: 4 x 1 x 1, 2 x 2 x 1, 1 x 4 x 1"):
        Parallel(replicate=3, shard=2).mesh(4)
    with pytest.raises(UserError, match=r"there are 8; what fits: 4 x 1 x 2, 2 x 2 x 2, 1 x 4 x 2"):
        Parallel(replicate=3, sequence=2).mesh(8)
