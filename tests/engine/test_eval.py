"""`eval`: pictures for captions at several guidance scales, scored beside baselines, resumed and shared by ranks."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from core.build import load_frozen
from core.errors import UserError
from core.evaluation.items import captions_in, read_item
from core.recipe_file import dump
from core.run_facts import write_facts
from registry import get, main
from tests.engine.running import registry, short

NAME = "lvdm-text2video-tiny"
WORDS = ("--steps", "2", "--device", "cpu", "--num", "2")


@pytest.fixture(scope="module")
def run(sky, _migrated_store, tmp_path_factory):
    """The export of a run on pictures, with weights at which guidance shows: its folder, MLflow run and store."""
    folder = tmp_path_factory.mktemp("evaluated")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    client = MlflowClient(tracking_uri=store)
    made = client.create_run(client.create_experiment("pictures", artifact_location=str(folder / "artifacts")))
    write_facts(folder, {"run_id": made.info.run_id, "store": store})
    recipe = short(NAME, sky, "--data.num-frames 1")
    torch.manual_seed(0)
    system = recipe.system.build()
    load_frozen(recipe, system)
    for values in system.trained.parameters():
        values.data += 0.05 * torch.randn(values.shape)  # the last layer begins at zero
    system.export(folder / "export", {name: module.state_dict() for name, module in system.trained.items()})
    (folder / "export" / "recipe.json").write_text(dump(recipe))
    return folder / "export", made.info.run_id, store


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a red disc in the upper left\n\na blue bar in the middle\na green square\n")
    return file


def evaluate(run, *words, out):
    """The rows of the table and the folder of the set. The verb as the command line calls it, in this process."""
    code = main(["eval", str(run[0]), *WORDS, "--output-dir", str(out), *map(str, words)])
    assert code == 0
    with (out / "scores" / "scores.csv").open(newline="") as file:
        return {row["set"]: row for row in csv.DictReader(file)}


def pictures(out, scale):
    return {path.name: read_item(path)[0] for path in sorted((out / f"guidance-{scale}").glob("*.png"))}


def test_each_scale_has_the_same_noise_and_its_row_beside_the_baselines_in_the_run(run, captions, tmp_path, capsys):
    out = tmp_path / "set"
    rows = evaluate(run, "--captions", captions, "--guidance-scale", "1", "1.0001", "9", out=out)
    assert list(rows)[:3] == ["guidance 1", "guidance 1.0001", "guidance 9"]
    assert {"second real sample", "mean picture", "shuffled captions"} <= rows.keys()
    assert all(float(rows[name]["frechet"]) >= 0 for name in [*rows][:3])
    assert "guidance 9" in capsys.readouterr().out
    one, near, nine = (pictures(out, scale) for scale in ("1", "1.0001", "9"))
    assert one.keys() == nine.keys() and len(one) == 2
    for name in one:
        assert np.abs(one[name].astype(int) - near[name]).max() <= 1  # the noise is the same,
        assert np.abs(one[name].astype(int) - nine[name]).max() > 1  # and guidance has an effect
    files = {f.path for f in MlflowClient(tracking_uri=run[2]).list_artifacts(run[1], "eval/set")}
    assert files == {"eval/set/scores.csv", "eval/set/guidance.png"}
    with Image.open(out / "scores" / "guidance.png") as plot:
        assert np.asarray(plot.convert("L")).std() > 5


def test_what_is_there_is_not_made_again_and_another_seed_is_refused_until_restarted(run, captions, tmp_path, capsys):
    out = tmp_path / "set"
    rows = evaluate(run, "--captions", captions, "--guidance-scale", "3", "--no-log", out=out)
    kept, removed = sorted((out / "guidance-3").glob("*.png"))
    stamp, content = kept.stat().st_mtime_ns, removed.read_bytes()
    removed.unlink()
    assert evaluate(run, "--captions", captions, "--guidance-scale", "3", "--no-log", out=out) == rows
    assert (kept.stat().st_mtime_ns, removed.read_bytes()) == (stamp, content)
    words = ["eval", str(run[0]), *WORDS, "--output-dir", str(out), "--seed", "1", "--no-log"]
    capsys.readouterr()
    assert main(words) == 2
    assert "differs in seed" in capsys.readouterr().err and kept.exists()
    assert main([*words, "--restart", "--captions", str(captions), "--guidance-scale", "3"]) == 0
    assert kept.stat().st_mtime_ns != stamp


def test_two_processes_share_the_work_and_end_with_the_same_table(run, captions, tmp_path):
    words = ("--captions", str(captions), "--guidance-scale", "1", "3", "--no-log")
    rows = evaluate(run, *words, out=tmp_path / "one")
    shutil.copytree(tmp_path / "one" / "guidance-1", tmp_path / "two" / "guidance-1")
    shutil.copy(tmp_path / "one" / "made-by.json", tmp_path / "two")
    done = registry("eval", str(run[0]), *WORDS, *words, "--nproc", "2", "--output-dir", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 4 are there already" in done.stderr
    with (tmp_path / "two" / "scores" / "scores.csv").open(newline="") as file:
        both = {row["set"]: row for row in csv.DictReader(file)}
    assert both.keys() == rows.keys()
    for name, row in rows.items():
        assert both[name]["count"] == row["count"]
        if row["frechet"]:
            assert float(both[name]["frechet"]) == pytest.approx(float(row["frechet"]), rel=1e-2, abs=1e-6)


def test_the_captions_of_the_held_out_data_are_taken_where_none_are_given(run, tmp_path):
    rows = evaluate(run, "--no-log", out=tmp_path / "set")
    assert next(iter(rows)) == f"guidance {get(NAME).validation.sampler.guidance_scale:g}"
    assert float(rows["second real sample"]["colour"]) == 1.0  # real pictures of real captions
    facts = json.loads((tmp_path / "set" / "made-by.json").read_text())
    assert facts["weights_hash"] and "guidance_scale" not in facts["sampler"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--captions", "nowhere.txt"], "--captions nowhere.txt: cannot be read"),
        (["--statistics", "s.npz"], "they are of a network's features"),
        (["--guidance-scale", "1", "1"], "names a scale twice"),
        (["--num", "1"], "at least 2"),
        (["--inception", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--clip", "nowhere"], "--clip nowhere: expected a folder"),
        (["--i3d", "nowhere.pt"], "--i3d measures clips of 9 frames"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run, words, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["eval", str(run[0]), "--device", "cpu", "--output-dir", str(tmp_path / "o"), *words])
    said = capsys.readouterr().err
    assert code == 2 and why in said and "Traceback" not in said


def test_captions_are_read_from_text_and_from_tables(tmp_path):
    tsv, text = tmp_path / "coco.tsv", tmp_path / "c.txt"
    tsv.write_text("id\tcaption_en\n1\ta cat, sitting\n2\t\n3\ta dog\n")
    assert captions_in(tsv) == ["a cat, sitting", "a dog"]
    text.write_text("a cat, sitting\n\na dog\n")
    assert captions_in(text) == ["a cat, sitting", "a dog"]
    tsv.write_text("id\twords\n1\ta cat\n")
    with pytest.raises(UserError, match="expected a column called caption_en or caption"):
        captions_in(tsv)


def test_a_damaged_item_is_named(run, captions, tmp_path, capsys):
    out = tmp_path / "set"
    evaluate(run, "--captions", captions, "--guidance-scale", "1", "--no-log", out=out)
    item = sorted((out / "guidance-1").glob("*.png"))[0]
    item.write_bytes(item.read_bytes()[:60])
    words = ["--captions", str(captions), "--guidance-scale", "1", "--no-log"]
    assert main(["eval", str(run[0]), *WORDS, "--output-dir", str(out), *words]) == 2
    assert f"{item.name}: damaged" in capsys.readouterr().err
