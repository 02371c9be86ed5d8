"""The verbs that read, from the inside and as real commands."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from functools import partial
from pathlib import Path

import pytest

import registry
from core.recipe_file import dump, load
from core.verbs.diff import differences
from core.verbs.help import VERBS

ROOT = Path(__file__).parents[2]
SKY, TINY = "lvdm-short-sky", "lvdm-short-sky-tiny"


def command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "registry", *words], cwd=ROOT, capture_output=True, text=True, **options
    )


def test_list_has_a_line_for_each_recipe(capsys):
    assert registry.main(["list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "system", "data", "what", "it", "is"]
    assert [line.split()[:3] for line in lines if SKY in line.split()] == [[SKY, "Diffusion", "FrameFolders"]]
    assert [line.split()[0] for line in lines] == registry.names()
    assert len({line.index("FrameFolders") for line in lines if "FrameFolders" in line}) == 1, "columns are not aligned"


def listed(capsys, *words: str) -> list[str]:
    code = registry.main(["list", "--json", *words])
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert code == (not names)
    return names


def test_list_shows_what_all_words_tags_and_conditions_hold_for(capsys):
    every = [registry.get(name) for name in registry.names()]
    assert SKY in listed(capsys, "SKY", "unconditional") and "kl-vae" not in listed(capsys, "sky", "unconditional")
    assert listed(capsys, "no such words") == []
    assert listed(capsys, "--tag", "experiment") == registry.names()
    filed = [r.name for r in every if r.tracking.experiment == "lvdm"]
    assert listed(capsys, "--tag=experiment=lvdm") == filed and SKY in filed and filed != registry.names()
    assert listed(capsys, "--tag", "experiment=lv") == []
    slow = [r.name for r in every if r.optim.lr < 1e-4]
    assert listed(capsys, "--where", "optim.lr<1e-4") == slow and SKY in slow and slow != registry.names()
    assert listed(capsys, "--where", "optim.lr >= 1e-4") == [n for n in registry.names() if n not in slow]
    with_loss = [r.name for r in every if hasattr(r.system, "objective") and r.system.objective.loss == "l1"]
    assert listed(capsys, "--where", "system.objective.loss=l1") == with_loss and SKY in with_loss
    assert listed(capsys, "tiny", "--where", "system.objective.loss=l1") == [n for n in with_loss if "tiny" in n]
    assert listed(capsys, "--where", "optim.ema=None") == [r.name for r in every if r.optim.ema is None]


def test_list_says_when_there_is_none(capsys):
    assert registry.main(["list", "no such words"]) == 1
    assert capsys.readouterr().out == "no recipe is like that\n"


def test_list_and_show_as_json_are_whole(capsys):
    registry.main(["list", "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == registry.names()
    registry.main(["show", SKY, "--lr", "7e-5", "--json"])
    assert load(capsys.readouterr().out, "out") == registry.get(SKY, "--lr", "7e-5")


def test_show_names_every_field_and_overrides_change_it(capsys):
    registry.main(["show", SKY, "--lr", "0.125"])
    out = capsys.readouterr().out
    assert "Unconditional LVDM on Sky Timelapse" in out
    assert [line.split() for line in out.splitlines() if line.startswith("  lr ")] == [["lr", "0.125"]]


def test_diff_of_equal_sides_exits_with_zero(capsys):
    assert registry.main(["diff", SKY, f"{SKY} --lr 6e-5"]) == 0
    assert "no field differs" in capsys.readouterr().out


def test_diff_shows_only_what_differs_under_its_slot(capsys):
    assert registry.main(["diff", SKY, f"{SKY} --lr 0.125 --optim.ema=EMA --seed 1"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["optim"],
        ["lr", "6e-05", "0.125"],
        ["ema", "None", "EMA"],
        ["ema.decay", "-", "0.9999"],
        ["ema.warmup", "-", "True"],
        ["loop"],
        ["seed", "23", "1"],
    ]


def test_diff_as_json_leaves_out_the_side_that_has_no_such_field(capsys):
    assert registry.main(["diff", "--json", SKY, f"{SKY} --optim.ema=EMA"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert not value["equal"]
    assert value["differences"][0] == {"field": "optim.ema", "a": None, "b": "EMA"}
    assert value["differences"][1] == {"field": "optim.ema.decay", "b": 0.9999}


def test_diff_is_symmetric_and_empty_only_for_equal_recipes():
    recipes = [registry.get(name) for name in registry.names()]
    for a in recipes:
        for b in recipes:
            forth, back = differences(a, b), differences(b, a)
            assert {d.path for d in forth} == {d.path for d in back}
            assert (not forth) == all(
                getattr(a, f) == getattr(b, f) for f in ("data", "system", "optim", "loop", "validation", "checkpoint")
            )


def test_a_side_of_diff_is_a_file_or_an_output_directory(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(dump(registry.get(SKY, "--lr", "0.5")))
    for side in (str(tmp_path), str(tmp_path / "recipe.json")):
        assert registry.main(["diff", side, SKY]) == 1
        assert ["lr", "0.5", "6e-05"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_side_of_diff_is_a_run_in_the_store(store, tmp_path, capsys):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.create_experiment("diff", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, dump(registry.get(SKY, "--lr", "0.5")), "recipe.json")
    assert registry.main(["diff", SKY, f"run:{run}", "--store", store]) == 1
    assert ["lr", "6e-05", "0.5"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert registry.main(["diff", SKY, "run:nope", "--store", store]) == 2
    assert capsys.readouterr().err.startswith("error: run:nope")


# -------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = [
    (["lst"], "unknown verb 'lst' (did you mean 'list'?)"),
    (["--vers"], "unknown flag '--vers' (did you mean '--version'?)"),
    (["show"], "show needs the name of a recipe, for example: python -m registry show"),
    (["show", "nope"], "no recipe is called 'nope'"),
    (["show", SKY, "--lr", "x"], "--lr x: expected a number"),
    (["show", SKY, "--jsn"], "unknown flag --jsn (did you mean '--json'?)"),
    (["list", "--jsn"], "unknown flag --jsn (did you mean '--json'?)"),
    (["list", "--where", "optim.lrr<1"], "no recipe has a field 'optim.lrr' (did you mean 'optim.lr'?)"),
    (["list", "--where", "optim.lr"], "--where optim.lr: expected FIELD and <"),
    (["list", "--where=data.root<x"], "< compares numbers, and 'x' is none"),
    (["list", "--tag"], "--tag takes one value, got none"),
    (["diff", SKY], "diff needs two sides"),
    (["diff", SKY, "/no/such/file"], "/no/such/file does not exist"),
    (["diff", SKY, "n" * 300], "no recipe is called"),
    (["diff", SKY, "n" * 300 + ".json"], "cannot be read"),
    (["diff", SKY, TINY, "extra"], "unexpected word 'extra'"),
    (["run"], "run needs the name of a recipe"),
    (["run", SKY, "--nproc", "0"], "Launch.nproc = 0: must be at least 1"),
    (["run", SKY, "--name", "x"], "unknown flag --name (did you mean '--run-name'?)"),
    (["run", SKY, "--resume", "a", "--init-from", "b"], "Launch.resume = 'a': a resumed run has its own weights"),
    (["resume"], "resume needs a run: its MLflow id or its output directory"),
    (["resume", "x", "--resume", "y"], "leave out --resume"),
    (["resume", "x", "--max-steps", "0"], "no such run"),
    (["sample", "x", "--nums", "3"], "unknown flag --nums (did you mean '--num'?)"),
    (["sample", "x", "--num", "0"], "SampleFlags.num = 0: must be at least 1"),
    (["measure-latents", SKY, "--clips", "0"], "MeasureFlags.clips = 0: must be at least 1"),
    (["ui", "--port", "0"], "UiFlags.port = 0: must be between 1 and 65535"),
    (["ui", "--store", "sqlite:////no/such.db"], "the store sqlite:////no/such.db does not exist"),
    (["ui", "--store", "http://localhost:1"], "is a server already"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(words, message, capsys):
    assert registry.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "words", [["lst"], ["show", "nope"], ["show", SKY, "--lr", "x"], ["run", SKY, "--optim.lrr", "1"]]
)
def test_a_real_command_that_is_mistaken_prints_one_line_and_exits_with_2(words):
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback_by_flag_or_environment():
    for words, env in (
        (["show", "nope", "--debug"], {}),
        (["--debug", "show", "nope"], {}),
        (["show", "nope"], {"REGISTRY_DEBUG": "1"}),
    ):
        done = command(*words, env=os.environ | env)
        assert done.returncode == 2
        assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: no recipe")


def test_a_reader_that_stops_early_is_no_error():
    words = [sys.executable, "-m", "registry", "show", SKY]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b""
    assert process.returncode == 141


# ------------------------------------------------------------------------------------------------------------------ help


def test_help_names_every_verb_and_each_verb_has_an_example(capsys):
    assert set(VERBS) == set(registry.DO)
    for words in ([], ["--help"], ["-h"]):
        assert registry.main(words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {verb} " in out for verb in VERBS)
    for verb, entry in VERBS.items():
        assert registry.main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: python -m registry {verb}")
        assert entry.example in out and f"python -m registry {verb}" in entry.example


def test_the_help_of_run_lists_short_flags_swaps_and_every_field(capsys):
    assert registry.main(["run", SKY, "--optim.ema=EMA", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--batch-size     --loop.micro-batch   1" in out
    assert "--optim.ema=EMA                          EMA, None" in out
    for flag in ("--optim.ema.decay", "--system.denoiser.channel-mult", "--dry-run", "--output-dir"):
        assert flag in out
    assert out.count("usage:") == 1


def test_version_is_that_of_the_package():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert command("--version").stdout.strip() == registry.__version__ == project.get("version", registry.__version__)


# -------------------------------------------------------------------------------------------------------------------- ui


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ui_says_when_its_port_is_taken(store, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert registry.main(["ui", "--store", store, "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_ui_serves_the_store_until_it_is_interrupted(store):
    port = free_port()
    words = [sys.executable, "-m", "registry", "ui", "--store", store, "--port", str(port)]
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell starts in the background
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(words, cwd=ROOT, preexec_fn=reset, **quiet) as process:
        try:
            assert f"http://127.0.0.1:{port}" in process.stdout.readline()
            assert answers(f"http://127.0.0.1:{port}/health", 120)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
    assert not answers(f"http://127.0.0.1:{port}/health", 0)


def answers(url: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.status == 200
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.2)
