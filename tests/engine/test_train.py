"""The loop on real tiny runs: what is logged, written, resumed and refused."""

import json
import math
import os
import shutil
import signal
import threading
import time

import av
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from core.deferred import recording
from core.errors import UserError
from core.fresh import Fresh
from core.models.lvdm_unet import LVDMUNet
from core.outputs import find_run
from core.slots import AdamW, Launch, ParamGroup
from core.train import train
from tests.engine.running import TWINS, journal, losses, run_here, short

NAMES = {
    "loss",
    "lr",
    "grad_norm",
    "time/step_s",
    "time/data_share",
    "samples_per_s",
    "memory_gb",
    "skipped_samples",
    "nonfinite_steps",
}


class Finished(dict):
    """A finished run of each twin that is asked for."""

    def __init__(self, sky, folder, store):
        self.sky, self.folder, self.store = sky, folder, store

    def __missing__(self, name):
        more = "--validation.every 3 --validation.sample-every 3 --checkpoint.every 2 --checkpoint.keep 2"
        self[name] = run_here(short(name, self.sky, more), self.folder / name, self.store)
        return self[name]


@pytest.fixture(scope="module")
def finished(sky, _migrated_store, tmp_path_factory):
    """One finished run of each twin, with the URI of their store."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(_migrated_store, folder / "mlflow.db")
    store = f"sqlite:///{folder}/mlflow.db"
    return Finished(sky, folder, store), store


@pytest.mark.parametrize("name", TWINS)
def test_a_run_leaves_recipe_log_metrics_checkpoints_samples_and_an_export(finished, name):
    out = finished[0][name].output_dir
    assert {p.name for p in out.iterdir()} == {
        "recipe.json",
        "run.json",
        "run.log",
        "journal.jsonl",
        "synced.json",
        "provenance",
        "checkpoints",
        "samples",
        "export",
    }
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("name", TWINS)
def test_every_metric_has_its_name_and_is_finite(finished, name):
    lines = journal(finished[0][name].output_dir)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= NAMES and all(math.isfinite(v) for v in line.values()) for line in training)
    assert [line["step"] for line in lines if "val/loss" in line] == [3, 6]


def test_mlflow_has_params_tags_data_metrics_pictures_clips_and_the_state_finished(finished):
    results, store = finished
    result = results["lvdm-short-sky-tiny"]
    client = MlflowClient(tracking_uri=store)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.004" and run.data.params["system.denoiser"] == "LVDMShortUNet"
    assert (
        run.data.tags["recipe"] == "lvdm-short-sky-tiny"
        and run.data.tags["host"]
        and json.loads(run.data.tags["versions"])["torch"]
    )
    contexts = {tag.value: item.dataset.digest for item in run.inputs.dataset_inputs for tag in item.tags}
    assert contexts.keys() == {"training", "validation"} and len(set(contexts.values())) == 2
    history = client.get_metric_history(result.run_id, "loss")
    assert [(m.step, m.value) for m in history] == sorted(losses(result.output_dir).items())
    artifacts = {a.path for a in client.list_artifacts(result.run_id)}
    assert {"recipe.json", "run.log", "images", "samples"} <= artifacts
    assert any(a.path.endswith("samples.mp4") for a in client.list_artifacts(result.run_id, "samples/step-00000006"))
    pictures = {a.path.partition("+timestamp")[0] for a in client.list_artifacts(result.run_id, "images")}
    series = [f"{kind}~{cell}" for kind in ("samples", "reconstructions") for cell in (0, 1)]
    assert pictures == {f"images/{each}+step+{step}" for each in series for step in (3, 6)}


def test_the_kept_checkpoints_are_models_with_the_metrics_of_their_step_and_dataset(finished):
    results, store = finished
    result = results["lvdm-short-sky-tiny"]
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_run(result.run_id).info.experiment_id
    models = client.search_logged_models([experiment], filter_string=f"source_run_id = '{result.run_id}'")
    assert sorted((m.name, m.tags["path"]) for m in models) == [
        (f"step-0000000{step}-lvdm-short-sky-tiny", f"checkpoints/step-0000000{step}") for step in (4, 6)
    ]
    digests = {i.tags[0].value: i.dataset.digest for i in client.get_run(result.run_id).inputs.dataset_inputs}
    for model in models:
        found = {m.key: m for m in model.metrics}
        assert found["loss"].value == losses(result.output_dir)[int(model.params["step"])]
        assert found["loss"].dataset_digest == digests["training"]
        assert found["val/loss"].dataset_digest == digests["validation"]


def test_the_clips_open_and_have_the_frames_of_the_recipe(finished):
    folder = finished[0]["lvdm-short-sky-tiny"].output_dir / "samples" / "step-00000006"
    with av.open(str(folder / "samples.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == 16 and frames[0].shape[0] >= 256
    with Image.open(folder / "samples.png") as page, Image.open(folder / "samples.gif") as moving:
        assert page.size == (8 * 66 - 2, 2 * 66 - 2) and moving.n_frames == 16
    assert {p.stem for p in folder.glob("*.mp4")} == {"samples", "reconstructions"}


def test_the_export_opens_as_a_diffusers_model_with_the_averaged_weights(finished):
    out = finished[0]["lvdm-short-sky-tiny"].output_dir
    model = LVDMUNet.from_pretrained(out / "export" / "unet")
    saved = load_file(next((out / "checkpoints" / "step-00000006").glob("*.safetensors")))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"ema.unet.{name}"])
    assert not torch.equal(saved["ema.unet.out.2.weight"], saved["weights.unet.out.2.weight"])
    assert {p.name for p in (out / "export").iterdir()} == {"unet", "vae", "scheduler", "recipe.json"}


@pytest.mark.parametrize("name", TWINS)
def test_a_resumed_run_has_bit_for_bit_the_losses_of_an_undisturbed_one(finished, name, sky, store, tmp_path):
    done = finished[0][name].output_dir
    out = tmp_path / "run"
    shutil.copytree(done, out)
    for name_of_file in ("run.json", "journal.jsonl", "synced.json"):  # steps that are noted are not noted again
        (out / name_of_file).unlink()
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    recipe = short(
        name, sky, "--validation.every 3 --validation.sample-every 3 --checkpoint.every 2 --checkpoint.keep 2"
    )
    result = train(recipe, Launch(resume=str(out), store=store, device="cpu"))
    again = {line["step"]: line for line in journal(out) if "loss" in line}
    assert result.step == 6 and again.keys() == {5, 6}
    for step, line in again.items():
        assert line["loss"] == losses(done)[step]
    assert result.metrics == finished[0][name].metrics


def test_losses_depend_neither_on_the_micro_batch_nor_on_the_workers(sky, store, tmp_path):
    by = {}
    for key, more in {"a": "--batch-size 4", "b": "--batch-size 1", "c": "--batch-size 2 --num-workers 2"}.items():
        by[key] = losses(
            run_here(short("lvdm-short-sky-tiny", sky, more + " --max-steps 3"), tmp_path / key, store).output_dir
        )
    assert by["b"] == pytest.approx(by["a"], rel=1e-4) and by["c"] == pytest.approx(by["a"], rel=1e-4)


def test_another_seed_is_another_run_and_the_same_seed_the_same(sky, store, tmp_path):
    runs = [
        losses(
            run_here(
                short("lvdm-short-sky-tiny", sky, f"--max-steps 2 --seed {s}"), tmp_path / str(i), store
            ).output_dir
        )
        for i, s in enumerate((1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_with_fp32_weights_and_about_the_same_loss(sky, store, tmp_path, precision):
    by = {}
    for name in ("fp32", precision):
        out = run_here(short("lvdm-short-sky-tiny", sky, f"--max-steps 3 --precision {name}"), tmp_path / name, store)
        by[name] = [(line["loss"], line["grad_norm"]) for line in journal(out.output_dir) if "loss" in line]
    out = tmp_path / precision
    np.testing.assert_allclose(by[precision], by["fp32"], rtol=0.03)
    assert by[precision] != by["fp32"]  # it really computed in something else
    saved = load_file(next((out / "checkpoints" / "step-00000003").glob("*.safetensors")))
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_every_attention_back_end_trains_alike_and_one_that_does_not_work_here_falls_back_with_a_warning(
    sky, store, tmp_path
):
    by = {}
    for name in ("sdpa", "eager", "flash"):
        recipe = short("lvdm-short-sky-tiny", sky, f"--max-steps 2 --system.attention {name}")
        by[name] = losses(run_here(recipe, tmp_path / name, store).output_dir)
    assert by["eager"] == pytest.approx(by["sdpa"], rel=1e-5) and by["flash"] == pytest.approx(by["sdpa"], rel=1e-5)
    with pytest.warns(UserWarning, match="attention 'xformers' does not work on cpu.*sdpa is used"):
        out = run_here(
            short("lvdm-short-sky-tiny", sky, "--max-steps 2 --system.attention xformers"), tmp_path / "x", store
        ).output_dir
    assert losses(out) == by["sdpa"]
    assert "attention" not in (out / "export" / "unet" / "config.json").read_text().replace("attention_resolutions", "")


def test_activation_checkpointing_changes_no_loss(sky, store, tmp_path):
    plain = run_here(short("lvdm-short-sky-tiny", sky, "--max-steps 3"), tmp_path / "plain", store)
    less = run_here(
        short("lvdm-short-sky-tiny", sky, "--max-steps 3 --loop.activation-checkpointing True"),
        tmp_path / "less",
        store,
    )
    assert losses(less.output_dir) == losses(plain.output_dir)


def test_a_profile_is_written_when_asked_for(sky, store, tmp_path):
    out = run_here(short("lvdm-short-sky-tiny", sky, "--loop.profile 1"), tmp_path / "run", store).output_dir
    assert "traceEvents" in json.loads((out / "profile.json").read_text())


def test_a_parameter_group_has_its_own_rate_and_a_pattern_without_match_is_an_error(sky, store, tmp_path):
    recipe = short("lvdm-short-sky-tiny", sky, "--max-steps 2")
    frozen = recipe.but(optim=recipe.optim.but(groups=(ParamGroup(pattern="time_embed", lr_scale=0.0),), ema=None))
    out = run_here(frozen, tmp_path / "run", store).output_dir
    with recording() as tape:
        trained = recipe.system.build().trained
    Fresh(tape, trained).fill(trained, recipe.loop.seed, torch.device("cpu"))
    fresh, saved = trained.state_dict(), load_file(next(out.glob("checkpoints/*/*.safetensors")))
    moved = {name for name in fresh if not torch.equal(fresh[name], saved[f"weights.{name}"])}
    assert moved and not any("time_embed" in name for name in moved)
    wrong = recipe.but(optim=AdamW(groups=(ParamGroup(pattern="nowhere"),)))
    with pytest.raises(UserError, match="'nowhere' matches no trained parameter"):
        run_here(wrong, tmp_path / "wrong", store)


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run_after_too_many(sky, store, tmp_path):
    recipe = short(
        "lvdm-short-sky-tiny",
        sky,
        "--lr 1e30 --optim.schedule.name constant --optim.schedule.warmup-steps 0 --loop.max-nonfinite 2 --max-steps 9",
    )
    with pytest.raises(UserError, match=r"2 updates in a row are not finite.*--lr"):
        run_here(recipe, tmp_path / "run", store)
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    assert MlflowClient(tracking_uri=store).get_run(run_id).info.status == "FAILED"
    assert max(line["nonfinite_steps"] for line in journal(tmp_path / "run") if "nonfinite_steps" in line) >= 1


def test_bad_samples_are_named_in_the_log_counted_and_stop_the_run_above_the_share(sky, store, tmp_path):
    shutil.copytree(sky, tmp_path / "sky")
    for clip in sorted((tmp_path / "sky" / "train").glob("*/*"))[:1]:
        for frame in clip.iterdir():
            frame.write_bytes(frame.read_bytes()[:300])
    out = run_here(
        short("lvdm-short-sky-tiny", tmp_path / "sky", "--data.max-bad-share 0.9"), tmp_path / "run", store
    ).output_dir
    assert journal(out)[-2]["skipped_samples"] >= 1 or any(line.get("skipped_samples", 0) >= 1 for line in journal(out))
    assert "skipped" in (out / "run.log").read_text() and clip.name in (out / "run.log").read_text()
    with pytest.raises(UserError, match=r"could not be read, more than data.max_bad_share = 0.0"):
        run_here(
            short("lvdm-short-sky-tiny", tmp_path / "sky", "--data.max-bad-share 0.0 --max-steps 30"),
            tmp_path / "strict",
            store,
        )


def test_sigterm_finishes_the_update_saves_and_marks_the_run_killed(sky, store, tmp_path):
    def interrupt():
        while not (tmp_path / "run" / "journal.jsonl").is_file() or len(journal(tmp_path / "run")) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run_here(short("lvdm-short-sky-tiny", sky, "--max-steps 500"), tmp_path / "run", store)
    thread.join()
    assert result.asked.signal == signal.SIGTERM and result.step < 500
    assert find_run(str(tmp_path / "run"), None) == tmp_path / "run"
    assert (tmp_path / "run" / "checkpoints" / f"step-{result.step:08d}" / "state.json").is_file()
    assert MlflowClient(tracking_uri=store).get_run(result.run_id).info.status == "KILLED"


def test_resume_refuses_a_recipe_that_learns_something_else_and_says_which_fields(finished, sky, store):
    out = finished[0]["lvdm-short-sky-tiny"].output_dir
    other = short("lvdm-short-sky-tiny", sky, "--lr 1e-5 --checkpoint.every 2")
    with pytest.raises(UserError, match=r"optim\.lr: 0\.004 there, 1e-05 here.*--allow optim\.lr.*--init-from"):
        train(other, Launch(resume=str(out), store=store))


def test_init_from_starts_from_the_weights_of_another_run(finished, sky, store, tmp_path):
    source = finished[0]["lvdm-short-sky-tiny"].output_dir
    out = run_here(
        short("lvdm-short-sky-tiny", sky, "--max-steps 1 --lr 1e-20"), tmp_path / "run", store, init_from=str(source)
    ).output_dir
    exported = load_file(source / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_file(next(out.glob("checkpoints/*/*.safetensors")))
    for name, tensor in exported.items():
        np.testing.assert_allclose(saved[f"weights.unet.{name}"], tensor, atol=1e-12)


def test_a_directory_in_use_is_refused_and_overwrite_removes_a_run_but_nothing_else(finished, sky, store, tmp_path):
    recipe = short("lvdm-short-sky-tiny", sky, "--max-steps 1")
    out = run_here(recipe, tmp_path / "run", store).output_dir
    with pytest.raises(UserError, match=r"is not empty.*--resume auto.*--overwrite"):
        run_here(recipe, out, store)
    assert run_here(recipe, out, store, overwrite=True).step == 1
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"files that no run wrote \(thesis.txt\)"):
        run_here(recipe, out, store, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine" and (out / "checkpoints").is_dir()
