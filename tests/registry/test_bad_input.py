"""What people get wrong, as a process: one clear line (or one screen), exit 2, nothing written, no traceback."""

import json
import os

import pytest

from tests.engine.processes import command
from tests.engine.running import flags


def refused(done, *says):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    for text in says:
        assert text in done.stderr, done.stderr
    return done.stderr


def one_line(done, *says):
    assert refused(done, *says).strip().count("\n") == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnu", "lvdm-short-sky"], ["run"]),
        (["run", "lvdm-short-ski"], ["lvdm-short-sky"]),
        (["run", "lvdm-short-sky", "--optim.lrr", "1"], ["--optim.lr"]),
        (["run", "lvdm-short-sky", "--lr", "fast"], ["--lr", "fast", "a number"]),
        (["run", "lvdm-short-sky", "--precision", "bf61"], ["bf16"]),
        (["run", "lvdm-short-sky", "--lr", "-1"], ["lr", "must be positive"]),
        (["show", "lvdm-short-sky", "--optim=Adamw"], ["AdamW"]),
        (["resume", "runs/nowhere"], ["runs/nowhere"]),
    ],
)
def test_a_slip_of_the_keyboard_gets_the_right_word_in_one_line(tmp_path, store, words, says):
    one_line(command(*words, cwd=tmp_path, env={"MLFLOW_TRACKING_URI": store}), *says)
    assert {p.name for p in tmp_path.iterdir()} <= {"mlflow.db"}


def test_a_fresh_clone_without_weights_and_data_gets_one_screen_with_sources_and_commands(tmp_path):
    done = command("run", "lvdm-short-sky", "--lr", "6e-5", cwd=tmp_path)
    refused(
        done,
        "system.autoencoder.weights",
        "hf download Yingqing/LVDM",
        "data.root",
        "sky_timelapse",
        "lvdm-short-sky-tiny",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "empty", "flat"])
def test_a_wrong_root_says_what_was_expected_and_what_was_found(tmp_path, kind):
    root = tmp_path / "data"
    if kind != "missing":
        root.mkdir()
    if kind == "flat":
        (root / "train").mkdir()
        (root / "train" / "movie.mp4").write_bytes(b"x")
    done = command("run", "lvdm-short-sky-tiny", "--data-root", str(root), cwd=tmp_path)
    refused(done, str(root))
    if kind == "flat":
        assert "movie.mp4" in done.stderr and "<video>/<clip>" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"data"}


def test_clips_shorter_than_asked_for_are_counted_with_the_longest(tmp_path, sky):
    done = command("run", "lvdm-short-sky-tiny", "--data-root", str(sky), "--num-frames", "64", cwd=tmp_path)
    one_line(done, "64", "20")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_output_directory_is_one_line(tmp_path, sky):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    one_line(
        command("run", *flags("lvdm-short-sky-tiny", sky), "--output-dir", str(folder / "run"), cwd=tmp_path),
        "cannot write",
    )


def test_an_output_directory_that_cannot_be_made_is_one_line(tmp_path, sky):
    (tmp_path / "file").write_text("in the way")
    done = command(
        "run", *flags("lvdm-short-sky-tiny", sky), "--output-dir", str(tmp_path / "file" / "run"), cwd=tmp_path
    )
    one_line(done, "--output-dir", "cannot write there")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d | {"format": 99}, ["format 99", "upgrade"]),
        (lambda d: d | {"fields": d["fields"] | {"optimm": 1}}, ["optimm"]),
        (lambda d: d | {"fields": {k: v for k, v in d["fields"].items() if k != "loop"}}, ["loop"]),
        (lambda d: "nonsense", ["recipe.json"]),
    ],
)
def test_a_recipe_file_that_does_not_fit_is_one_line(tmp_path, change, says):
    from core.recipe_file import dump
    from registry import get

    document = change(json.loads(dump(get("lvdm-short-sky-tiny"))))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(document))
    one_line(command("diff", "lvdm-short-sky-tiny", str(path), cwd=tmp_path), *says)


def test_weights_that_are_nowhere_and_weights_of_another_network_are_one_line_each(tmp_path, sky):
    base = flags("lvdm-short-sky-tiny", sky)
    one_line(
        command("run", *base, "--system.autoencoder.weights", "weights/none.ckpt", cwd=tmp_path), "weights/none.ckpt"
    )
    wrong = command("run", *base, "--system.autoencoder.n-hiddens", "8", cwd=tmp_path)
    one_line(wrong, "misshapen", "VideoAutoencoder")
    gone = command(
        "run", *base, "--system.autoencoder.weights", "someone/model", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}
    )
    one_line(gone, "hf download someone/model")
