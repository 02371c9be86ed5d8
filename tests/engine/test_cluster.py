"""Several machines: the job that `launch` prints, run for real on one; two torchrun agents as two machines."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from mlflow import MlflowClient
from torch.distributed import HashStore

import registry
from core.distributed import of_this_start
from core.errors import UserError
from core.verbs.run import descendants
from tests.engine.processes import run_ranks, start_words
from tests.engine.running import REPO, flags, losses, short
from tests.engine.test_distributed import ranks_of, said_by, steps, wait_for
from tests.tracking.servers import free_port

NAME = "lvdm-video-vae-tiny"
MANY = 40
"""Updates, so many that a busy machine sees the first ones before the last."""
FEW = 24
PATIENCE = 280.0
"""Seconds, for a busy machine."""

CLUSTER = {
    # srun gives the words after its own to each machine; there is one
    "srun": 'echo $$ > step; while [[ $1 == -* ]]; do shift; done; exec "$@"',
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM "$(cat step)"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" > requeued',
}
"""Programs that stand in for SLURM's own."""


def slurm(folder, text, **more):
    """The printed script, started as SLURM would start it."""
    for name, lines in CLUSTER.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with (folder / "job.log").open("a") as log:
        return subprocess.Popen(
            ["bash", "-c", text], cwd=folder, env=os.environ | job | paths | more, stdout=log, stderr=log
        )


def test_the_printed_slurm_job_stops_before_its_limit_is_queued_again_and_goes_on(
    sky, store, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = flags(NAME, sky, f"--max-steps {MANY} --batch-size 1")
    cluster = ["--slurm", "--nodes", "1", "--gpus", "0", "--processes", "2"]
    assert registry.main(["launch", *words, *cluster, "--output-dir", "the run", "--store", store]) == 0
    text = capsys.readouterr().out
    out, said = tmp_path / "the run", tmp_path / "job.log"
    first = slurm(tmp_path, text)
    wait_for(lambda: steps(out) >= 3 or first.poll() is not None, PATIENCE)
    first.send_signal(signal.SIGUSR1)  # what #SBATCH --signal=B:USR1@300 makes SLURM send to the script
    first.wait(PATIENCE)
    last = max(losses(out))
    assert (tmp_path / "requeued").read_text().split() == ["requeue", str(os.getpid())], said.read_text()[-3000:]
    assert 3 <= last < MANY and (out / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
    (tmp_path / "requeued").unlink()
    again = slurm(tmp_path, text, SLURM_RESTART_COUNT="1")
    assert again.wait(PATIENCE) == 0, said.read_text()[-3000:]
    assert losses(out).keys() == set(range(1, MANY + 1)) and not (tmp_path / "requeued").exists()
    assert f"resumed at step {last}" in (out / "run.log").read_text()


@contextmanager
def agents(sky, store, out, count, *more):
    """Torchrun agents that meet on loopback at the first of them, as machines would, a process each; none is left
    behind.
    """
    words = flags(NAME, sky, f"--max-steps {FEW} --batch-size 1 --checkpoint.every 3")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", *more]
    meet = ["--rdzv-backend=c10d", "--rdzv-id=x", f"--rdzv-endpoint=localhost:{free_port()}"]
    conf = "--rdzv-conf=last_call_timeout=6,keep_alive_interval=2,is_host="
    run = ["-m", "--", "registry", "run", *words, "--output-dir", str(out), "--store", store, "--resume", "auto"]
    variables = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with out.with_suffix(".stderr").open("a") as said:
        found = [
            subprocess.Popen(
                [*launcher, *meet, f"{conf}{not number}", *run], env=os.environ | variables, cwd=out.parent, stderr=said
            )
            for number in range(count)
        ]
    try:
        yield found
    finally:
        for agent in found:
            kill(agent)


def kill(agent):
    """The end of a machine: the agent and its process at once."""
    victims = [agent.pid, *descendants(agent.pid)]
    for pid in victims if agent.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def starts(out):
    """The steps from which the run was started or resumed, and on how many processes."""
    found = re.findall(r"(?:from|resumed at) step (\d+) of \d+, (?:(\d) x )?cpu", (out / "run.log").read_text())
    return [(int(step), int(world or 1)) for step, world in found]


def test_two_machines_survive_a_process_and_one_machine_survives_the_other(sky, store, tmp_path):
    """They train as one process does. First a process of the second machine dies, then the machine, agent and all."""
    out = tmp_path / "run"
    with agents(sky, store, out, 2, "--nnodes=1:2", "--max-restarts=5") as (first, second):
        wait_for(lambda: steps(out) >= 5 or first.poll() is not None, PATIENCE)
        (pid,) = ranks_of(second).values()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: steps(out) >= 10 or first.poll() is not None, PATIENCE)
        kill(second)
        assert first.wait(PATIENCE) == 0, said_by(out)[-5000:]
    words = f"--max-steps {FEW} --batch-size 1 --checkpoint.every 3"
    one = run_ranks(short(NAME, sky, words), 1, tmp_path / "one", store, timeout=PATIENCE)
    assert losses(out).keys() == losses(one).keys() == set(range(1, FEW + 1))
    # at the twin's own rate AdamW makes much of the last bits: later losses differ in the fifth digit
    assert [losses(out)[n] for n in range(1, 5)] == pytest.approx([losses(one)[n] for n in range(1, 5)], rel=1e-5)
    (begun, both), *between, (last, alone) = starts(out)
    assert (begun, both, alone) == (0, 2, 1) and 3 in [step for step, world in between if world == 2], starts(out)
    assert last >= 6
    ends = [json.loads((run / "checkpoints" / f"step-{FEW:08d}" / "state.json").read_text()) for run in (out, one)]
    assert [ends[0][key] == ends[1][key] for key in ("epoch", "drawn", "samples")] == [True] * 3


def test_restarts_that_would_meet_addresses_of_the_dead_are_refused_in_a_line(monkeypatch):
    facts = {"USE_AGENT_STORE": "True", "MAX_RESTARTS": "3", "RESTART_COUNT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    store = HashStore()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    of_this_start(store).set("address", "b")
    assert store.check(["attempt 1/address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each"):
        of_this_start(store)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert of_this_start(store) is store


def test_a_rank_that_hangs_is_named_with_the_collective_by_those_that_wait_for_it(sky, store, tmp_path):
    out, said, port = tmp_path / "run", tmp_path / "said", free_port()
    words = ["run", *flags(NAME, sky, "--max-steps 100000 --batch-size 1 --parallel.shard 2")]
    words += ["--output-dir", str(out), "--store", store, "--timeout", "20", "--device", "cpu"]
    found = [start_words(words, said, rank, 2, port) for rank in range(2)]
    wait_for(lambda: steps(out) >= 3 or found[0].exitcode is not None, PATIENCE)
    os.kill(found[1].pid, signal.SIGSTOP)
    found[0].join(PATIENCE)
    found[1].kill()
    assert found[0].exitcode == 2, said.read_text()[-3000:]
    (line,) = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: rank 0 of 2 lost rank 1, which died, was killed or hangs .*, in \w*(all|reduce)\w*, called by", line
    )
    assert re.search(r"in update \d+; --timeout is 20 s: ", line)
    run_id = json.loads((out / "run.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri=store).get_run(run_id).info.status == "FAILED"
