"""The verb `launch`: jobs that are checked before they are printed, and whole when they are."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import registry
from core.cli import parse
from core.slots import Launch
from core.verbs.cluster import seconds

TWIN = "lvdm-video-vae-tiny"
FITS = ["--global-batch", "16", "--batch-size", "1"]
K8S = ["--k8s", "--image", "me/train:1", "--volume", "claim", "--output-dir", "runs/a"]


def printed(capsys, *words):
    assert registry.main(["launch", TWIN, *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def read_back(words):
    """Recipe and launch that a job's words after `-m -- registry run` mean."""
    (
        *_,
        verb,
        name,
    ) = words[: words.index(TWIN) + 1]
    assert verb == "run"
    return parse(words[words.index(TWIN) + 1 :], registry.get(name), Launch())


def command_of(script):
    """The words of the script's srun line."""
    line = script.replace("\\\n", " ")
    return shlex.split(next(row for row in line.splitlines() if row.startswith("srun ")).removesuffix("&"))


def test_the_slurm_script_says_what_was_asked_and_its_words_mean_the_recipe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = "a 'b' $(touch x) \"c\""
    flags = [
        "--nodes",
        "2",
        "--gpus",
        "4",
        "--time",
        "1-12",
        "--partition",
        "long,short",
        "--account",
        "me",
        "--memory",
        "200G",
    ]
    more = ["--lr", "2e-4", "--data-root", odd, "--output-dir", f"runs/{odd}", "--setup", "module load cuda"]
    out = printed(capsys, "--slurm", *flags, *more, *FITS, "--max-restarts", "2", "--venv", "/opt/a b")
    assert (
        out.startswith("#!/bin/bash\n#SBATCH ") and subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    )
    for option in (
        "nodes=2",
        "gpus-per-node=4",
        "cpus-per-task=32",
        "time=1-12",
        "partition=long,short",
        "account=me",
        "mem=200G",
    ):
        assert f"#SBATCH --{option}\n" in out
    for option in ("signal=B:USR1@300", "requeue", "ntasks-per-node=1", "open-mode=append", f"job-name={TWIN}"):
        assert f"#SBATCH --{option}\n" in out
    assert out.index("\ncd -- ") < out.index("\nmodule load cuda\n") < out.index("\nsource '/opt/a b/bin/activate'")
    words = command_of(out)
    for word in (
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=$first:$port",
    ):
        assert word in words
    recipe, where = read_back(words)
    assert recipe == registry.get(TWIN, "--lr", "2e-4", "--data-root", odd, *FITS)
    assert (where.resume, where.output_dir) == ("auto", tmp_path / "runs" / odd)
    assert list(tmp_path.iterdir()) == []


def test_without_an_environment_the_python_that_prints_runs_the_job(capsys):
    words = command_of(printed(capsys, "--slurm", "--output-dir", "x", *FITS))
    assert words[words.index("-m") - 1] == sys.executable
    assert "--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" in words


def test_the_manifest_is_yaml_of_a_pytorchjob_and_its_words_mean_the_recipe(capsys):
    text = printed(
        capsys,
        *K8S,
        "--nodes",
        "2",
        "--gpus",
        "8",
        "--memory",
        "100G",
        "--time",
        "90",
        "--secret",
        "keys",
        *FITS,
        "--run-name",
        "A b",
    )
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"], job["metadata"]) == ("kubeflow.org/v1", "PyTorchJob", {"name": "a-b"})
    spec = job["spec"]
    assert spec["elasticPolicy"]["minReplicas"] == 2 and spec["runPolicy"]["activeDeadlineSeconds"] == 5400
    (kind,) = spec["pytorchReplicaSpecs"]
    worker = spec["pytorchReplicaSpecs"][kind]
    (pod,) = worker["template"]["spec"]["containers"]
    assert (kind, worker["replicas"], pod["name"], pod["image"]) == ("Worker", 2, "pytorch", "me/train:1")
    assert pod["resources"]["limits"] == {"cpu": "64", "memory": "100Gi", "nvidia.com/gpu": "8"}
    assert pod["envFrom"] == [{"secretRef": {"name": "keys"}}]
    words = pod["command"]
    assert words[:3] == ["python", "-m", "torch.distributed.run"] and "--rdzv-endpoint=a-b-worker-0:29500" in words
    recipe, where = read_back(words)
    assert recipe == registry.get(TWIN, *FITS) and where.output_dir == Path("/workspace/runs/a")
    # what has to be set up goes before, in a shell that torchrun then replaces
    with_setup = yaml.safe_load(printed(capsys, *K8S, *FITS, "--venv", "env", "--setup", "export A=1"))
    words = with_setup["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"]
    assert words[:2] == ["bash", "-c"] and words[2].splitlines()[:2] == [
        "export A=1",
        "source env/bin/activate || exit 1",
    ]
    assert read_back(shlex.split(words[2].splitlines()[2]))[0] == recipe


SLURM = ["--slurm", "--output-dir", "x", *FITS]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say for what, --slurm or --k8s"),
        (["--slurm", "--k8s"], "say for what"),
        (["--slurm"], "launch needs --output-dir"),
        ([*SLURM, "--nodes", "0"], "ClusterFlags.nodes = 0: must be at least 1"),
        ([*SLURM, "--nodes", "3"], "does not divide over 24 ranks x micro_batch 1"),
        ([*SLURM, "--parallel.shard", "3"], "parallel: replicate 2 x shard 3 x sequence 1 needs 6 ranks, there are 8"),
        ([*SLURM, "--lr", "x"], "--lr x: expected a number"),
        ([*SLURM, "--lrr", "1"], "unknown flag --lrr"),
        ([*SLURM, "--time", "1:2"], "ClusterFlags.time = '1:2': expected minutes"),
        ([*SLURM, "--partition", "a b"], "ClusterFlags.partition = 'a b': expected a name"),
        ([*SLURM, "--account", "x\n#SBATCH --wrap=ls"], "ClusterFlags.account"),
        ([*SLURM, "--job-name", "A"], "ClusterFlags.job_name = 'A': expected at most 50"),
        ([*SLURM, "--warn", "100"], "must be a minute more than --grace 120"),
        ([*SLURM, "--image", "i"], "--image does not go with --slurm"),
        ([*SLURM, "--nproc", "2"], "processes follow from --nodes and --gpus"),
        ([*SLURM, "--overwrite"], "launch --overwrite: not for a job that is started again"),
        ([*SLURM, "--resume", "runs/a"], "goes on in its --output-dir by itself"),
        ([*SLURM, "--processes", "2"], "there is one for each GPU, 8"),
        ([*SLURM, "--store", "http://me:word@host:5000"], "the job would hold the password"),
        ([*K8S, *FITS, "--partition", "a"], "--partition does not go with --k8s"),
        ([*K8S[:3], *FITS, "--output-dir", "a"], "needs --image, with this project in it, and --volume"),
        ([*K8S[:-1], "/data/run", *FITS], "--output-dir /data/run is not on the volume at /workspace"),
        ([*SLURM, "--submit", "sbatch"], "there is no sbatch here"),
    ],
)
def test_what_could_not_run_is_one_line_and_nothing_is_printed(words, says, capsys):
    assert registry.main(["launch", TWIN, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert "word@" not in err


def test_a_recipe_that_lacks_weights_is_a_screen_that_says_where_to_get_them(capsys):
    assert registry.main(["launch", "lvdm-short-sky", "--slurm", "--output-dir", "x", "--global-batch", "64"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "system.autoencoder.weights is not set" in err and "data.root" not in err


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
@settings(max_examples=30)
def test_a_time_limit_in_any_of_slurms_forms_is_its_seconds(days, hours, minutes, rest):
    assert seconds(f"{days}-{hours}:{minutes:02}:{rest:02}") == ((days * 24 + hours) * 60 + minutes) * 60 + rest
    assert seconds(f"{hours}:{minutes:02}:{rest:02}") == (hours * 60 + minutes) * 60 + rest
    assert seconds(f"{days}-{hours}") == (days * 24 + hours) * 3600
    assert seconds(f"{minutes}:{rest:02}") == minutes * 60 + rest and seconds(f"{minutes}") == minutes * 60


@pytest.mark.parametrize("how", ["sbatch", "submitit"])
def test_submit_hands_over_the_very_script_that_is_printed(capsys, tmp_path, monkeypatch, how):
    """A program called sbatch that keeps what it is given stands in for the cluster."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", 'cat "${1:-/dev/stdin}" > got; echo "Submitted batch job 7"'), ("srun", "exit 1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    script = printed(capsys, *SLURM)
    assert "Submitted batch job 7" in printed(capsys, *SLURM, "--submit", how)
    assert (tmp_path / "got").read_text() == script


def test_a_refusal_of_the_clusters_is_said_and_so_is_a_library_that_is_missing(capsys, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert registry.main(["launch", TWIN, *SLURM, "--submit", "sbatch"]) == 2
    assert "sbatch refused the script: sbatch: error: invalid partition" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert registry.main(["launch", TWIN, *SLURM, "--submit", "submitit"]) == 2
    assert "submitit is not installed; pip install '.[slurm]'" in capsys.readouterr().err
