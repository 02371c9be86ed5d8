"""`eval`: pictures for captions at several guidance scales, scored beside baselines, resumed and shared by ranks."""

import csv
import json
import shutil
import time

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

import core.sample_log
from core.errors import UserError
from core.evaluation.clip_score import CLIPScore
from core.evaluation.inception import Inception
from core.evaluation.items import captions_in, read_item
from core.evaluation.judges import as_clips
from core.evaluation.table import plot
from core.generation import Pace
from core.media import to_uint8
from core.metrics import frechet_distance
from core.recipe_file import read
from core.requests import slug
from core.run_facts import run_facts, write_facts
from core.validate import real_clips
from core.verbs.eval import TRIVIAL
from core.verbs.sync import sync
from data.laion import synthetic, write_part
from registry import get, main
from tests.engine.processes import start_words
from tests.engine.running import awake, run_here, short
from tests.evaluation.judges import write_clip, write_i3d, write_inception
from tests.tracking.servers import deaf, free_port

NAME = "ldm-laion400m-tiny"
WORDS = ("--steps", "2", "--device", "cpu", "--num", "2")


@pytest.fixture(scope="module")
def run(sky, _migrated_store, tmp_path_factory):
    """The export of a run of pictures, with weights at which guidance shows: its folder, MLflow run and store."""
    folder = tmp_path_factory.mktemp("evaluated")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    done = run_here(short(NAME, sky, "--max-steps 1 --global-batch 2"), folder / "run", store)
    return awake(folder / "run" / "export"), done.run_id, store


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a red disc in the upper left\n\na blue bar in the middle\na green square\n")
    return file


def evaluate(run, *words, out):
    """The rows of the table and the folder of the set. The verb as the command line calls it, in this process."""
    code = main(["eval", str(run[0]), *WORDS, "--output-dir", str(out), *map(str, words)])
    assert code == 0
    return table(out)


def held_out(run, count):
    """The first pictures of the held-out data as they are judged, (N, 3, 1, H, W)."""
    recipe = read(run[0])
    return as_clips([*to_uint8(real_clips(recipe.validation_data.build(), count))])


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


def table(out):
    with (out / "scores" / "scores.csv").open(newline="") as file:
        return {row["set"]: row for row in csv.DictReader(file)}


def test_two_processes_share_the_work_and_end_with_the_same_table(run, captions, tmp_path):
    words = ["--captions", str(captions), "--guidance-scale", "1", "3", "--no-log"]
    rows = evaluate(run, *words, out=tmp_path / "one")
    shutil.copytree(tmp_path / "one" / "guidance-1", tmp_path / "two" / "guidance-1")
    shutil.copy(tmp_path / "one" / "made-by.json", tmp_path / "two")
    words, port = ["eval", str(run[0]), *WORDS, *words, "--output-dir", str(tmp_path / "two")], free_port()
    ranks = [start_words(words, tmp_path / "said", rank, 2, port) for rank in range(2)]
    for rank in ranks:
        rank.join(200)
        rank.kill()
    said = (tmp_path / "said").read_text()
    assert [rank.exitcode for rank in ranks] == [0, 0], said[-2000:]
    assert said.count("2 of 4 are there already") == 1
    both = table(tmp_path / "two")
    assert both.keys() == rows.keys()
    for name, row in rows.items():
        assert both[name]["count"] == row["count"]
        if row["frechet"]:
            assert float(both[name]["frechet"]) == pytest.approx(float(row["frechet"]), rel=1e-2, abs=1e-6)


def test_an_evaluation_that_was_killed_goes_on_with_what_is_there(run, tmp_path):
    (tmp_path / "c.txt").write_text("".join(f"a red disc {n}\n" for n in range(16)))
    out = tmp_path / "set"
    words = [*WORDS[:4], "--captions", tmp_path / "c.txt", "--guidance-scale", "2", "--no-log", "--output-dir", out]
    words = ["eval", str(run[0]), *map(str, words)]
    process = start_words([*words, "--batch-size", "1"], tmp_path / "said")
    until = time.monotonic() + 120
    while len(whole(out)) < 2 and process.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.join()
    there = whole(out)
    assert 2 <= len(there) < 16 and not (out / "scores").exists()
    assert main([*words, "--batch-size", "8"]) == 0
    assert len(whole(out)) == 16 and there.items() <= whole(out).items()
    assert table(out)["guidance 2"]["count"] == "16" and not list(out.rglob(".partial-*"))


def whole(out):
    """Pictures that are there under their own name, and since when."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("guidance-2/a-*.png")}


def test_the_captions_of_the_held_out_data_are_taken_where_none_are_given(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Pace, "PAUSE", 0.0)
    rows = evaluate(run, "--no-log", "--batch-size", 1, out=tmp_path / "set")
    said = capsys.readouterr().err
    for what in ("made", "measured (guidance 3)", "measured (real)", "measured (second real sample)"):
        assert f"1 of 2 pictures {what}, 0.0 min left" in said
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


def test_too_few_real_ones_are_told_before_anything_is_made(tmp_path, capsys):
    for split, count in (("train", 2), ("test", 3)):
        (tmp_path / "p" / split).mkdir(parents=True)
        write_part(tmp_path / "p" / split / "part-00000.gz", synthetic(split, count, seed=7))
    words = ["eval", f"{NAME} --data-root {tmp_path}/p", *WORDS, "--output-dir", str(tmp_path / "o")]
    assert main(words) == 2 and "3 real samples: 4 are needed" in capsys.readouterr().err
    assert not list(tmp_path.glob("o/guidance-*"))


# ------------------------------------------------------------------------------------------------------ where it is told


def artifacts(store, run_id, folder):
    return {f.path for f in MlflowClient(tracking_uri=store).list_artifacts(run_id, folder)}


def test_by_default_the_set_is_in_the_run_and_its_scores_go_through_the_journal_to_mlflow(run, captions, capsys):
    export, run_id, store = run
    assert main(["eval", str(export), *WORDS, "--captions", str(captions), "--seed", "7"]) == 0
    folder = export.parent / "samples" / f"eval-{NAME}-export-seed-7"
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "scores")
    place = f"eval/{folder.name}"
    assert artifacts(store, run_id, place) == {f"{place}/scores.csv", f"{place}/guidance.png"}
    assert place in (export.parent / "journal.jsonl").read_text()


def test_a_store_that_is_down_costs_one_note_and_sync_brings_the_scores(run, captions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(core.sample_log, "WAIT", 0.5)
    copied = shutil.copytree(run[0].parent, tmp_path / "copied")
    with deaf() as uri:
        write_facts(copied, run_facts(copied) | {"store": uri})
        assert main(["eval", str(copied / "export"), *WORDS, "--captions", str(captions), "--seed", "8"]) == 0
    said = capsys.readouterr().err
    assert said.count("MLflow did not take them") == 1 and f"later: python -m registry sync {copied}" in said
    assert "Traceback" not in said
    place = f"eval/eval-{NAME}-export-seed-8"
    assert not artifacts(run[2], run[1], place)
    assert sync(str(copied), run[2]) == 0
    assert artifacts(run[2], run[1], place) == {f"{place}/scores.csv", f"{place}/guidance.png"}


# ------------------------------------------------------------------------------------------------- networks that judge


def test_fid_and_clip_score_are_those_of_the_pictures_and_statistics_take_the_place_of_real_ones(
    run, captions, tmp_path
):
    inception, clip, out = write_inception(tmp_path / "i.pth"), write_clip(tmp_path / "clip"), tmp_path / "set"
    words = ["--captions", captions, "--no-log", "--inception", inception, "--guidance-scale", "9", "1"]
    rows = evaluate(run, *words, "--clip", clip, "--write-statistics", tmp_path / "real.npz", out=out)
    net, score = Inception(inception), CLIPScore(clip)
    with torch.no_grad():
        theirs = net(held_out(run, 2)[:, :, 0]).double().numpy()
        for scale in ("1", "9"):
            made = as_clips([frames[None] for frames in pictures(out, scale).values()])
            ours = net(made[:, :, 0]).double().numpy()
            found = float(rows[f"guidance {scale}"]["fid"])
            assert found == pytest.approx(frechet_distance(ours, theirs), rel=1e-3) and found > 1e-3
            texts = [
                text for name in pictures(out, scale) for text in captions_in(captions) if name.startswith(slug(text))
            ]
            assert float(rows[f"guidance {scale}"]["clip"]) == pytest.approx(score(made, texts).mean().item(), abs=1e-3)
    assert all(row["fid"] and row["kid"] and row["clip"] for row in rows.values() if row["set"] != "shuffled captions")
    given = evaluate(run, *words[:-2], "1", "--statistics", tmp_path / "real.npz", out=out)
    assert float(given["guidance 1"]["fid"]) == pytest.approx(float(rows["guidance 1"]["fid"]))
    assert "kid" not in given["guidance 1"] and "clip" not in given["guidance 1"]


def test_the_plot_is_distance_over_clip_score_in_the_order_of_guidance_with_baselines_as_lines():
    rows = [
        {"set": "guidance 7", "guidance": 7.0, "fid": 3.0, "clip": 25.0},
        {"set": "guidance 1", "guidance": 1.0, "fid": 9.0, "clip": 20.0},
        {"set": "second real sample", "guidance": None, "fid": 2.0, "clip": 30.0},
    ]
    (axes,) = plot(rows, "fid").axes
    curve, baseline = axes.lines
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("CLIP score", "FID")
    assert curve.get_xydata().tolist() == [[20.0, 9.0], [25.0, 3.0]] and set(baseline.get_ydata()) == {2.0}
    assert {text.get_text() for text in axes.texts} == {"1", "7", "second real sample"}
    (axes,) = plot([{k: v for k, v in row.items() if k != "clip"} for row in rows], "fid").axes
    assert axes.get_xlabel() == "guidance scale" and axes.lines[0].get_xdata().tolist() == [1.0, 7.0]
    assert plot([{"set": "guidance 1", "guidance": 1.0}], "fid") is None


@pytest.mark.parametrize("judged", [True, False], ids=["i3d", "by hand"])
def test_clips_of_a_recipe_that_is_told_nothing_are_scored_beside_what_does_not_move(sky, tmp_path, judged, capsys):
    words = ["--i3d", str(write_i3d(tmp_path / "i3d.pt"))] if judged else []
    where = f"lvdm-short-sky-tiny --data-root {sky} --data.num-frames 12"
    out = tmp_path / "set"
    assert main(["eval", where, *WORDS, *words, "--output-dir", str(out)]) == 0
    rows, names = table(out), ("fvd", "kvd") if judged else ("frechet", "kernel")
    assert list(rows) == ["guidance 1", "second real sample", "mean clip", *TRIVIAL.values()]
    assert all(row.keys() == {"set", "guidance", "count", *names} for row in rows.values())
    values = {name: [float(row[n]) for n in names] for name, row in rows.items()}
    assert np.isfinite(list(values.values())).all()
    assert len({round(value, 9) for value, _ in values.values()}) == 5  # each is another set
    assert sorted(p.suffix for p in (out / "guidance-1").iterdir()) == [".npy", ".npy"]
    assert read_item(next((out / "guidance-1").iterdir())).shape == (12, 64, 64, 3)
    assert "has fresh weights" in capsys.readouterr().err
