"""MLflow's copy: all of the journal, once, whatever interrupts the sending, and nothing that it refuses or spoils."""

import json
import math
import shutil
import sqlite3
import time

import pytest
from mlflow import MlflowClient

from core.journal import FILE_NAME, read
from core.mlflow_limits import PARAM_LIMIT, cut, name
from core.redact import without_password
from core.replica import Replica
from core.run_facts import run_facts, write_facts
from core.verbs.sync import send
from registry import get
from tests.tracking.running import artifacts, checkpoint, content, everything, opened, picture, points, runs_of


@pytest.fixture
def closed(tmp_path, store):
    """A run with one of everything, closed; its tracker."""
    tracker = opened(tmp_path / "run", store)
    everything(tracker)
    tracker.close("FINISHED")
    return tracker


def test_everything_that_the_journal_says_is_in_mlflow(closed, store):
    found = content(store, closed.run_id)
    assert (found["status"], found["name"]) == ("FINISHED", "of-a-test")
    assert [(step, value) for step, _, value in found["metrics"]["loss"][0]] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    times = {
        e["step"]: e["time"] for e, _ in read(closed.journal.path) if e["event"] == "metrics" and "loss" in e["values"]
    }
    assert {step: time for step, time, _ in found["metrics"]["loss"][0]} == times
    tags = found["tags"]
    assert tags["recipe"] == "lvdm-short-sky-tiny" and tags["recipe.delta"] == "" and len(tags["recipe.hash"]) == 64
    assert tags["mood"] == "good" and tags["process.boot"] and tags["process.started"] and tags["device"] == "1 x cpu"
    assert "twin of lvdm-short-sky" in tags["mlflow.note.content"].lower() and json.loads(tags["versions"])["torch"]
    assert found["params"]["system.denoiser"] == "LVDMShortUNet"
    assert {(digest, context) for _, digest, context in found["data"]} == {
        ("0123456789abcdef", "training"),
        ("fedcba9876543210", "validation"),
    }
    paths = {path for path, _ in found["artifacts"]}
    assert {"recipe.json", "run.log", "provenance/environment.txt"} <= paths
    assert sum(path.startswith("images/samples~0+step+3+") for path in paths) == 2  # and its thumbnail
    ((model, status, metrics),) = found["models"]
    assert (model, status) == ("step-00000003-lvdm-short-sky-tiny", "READY")
    assert {(key, value) for key, value, _ in metrics} == {("loss", 1 / 3), ("lr", 1e-3), ("val/loss", 0.5)}
    assert found["outputs"] == 1


def test_the_environment_has_every_package_with_its_version(closed):
    text = (closed.folder / "provenance" / "environment.txt").read_text()
    assert "\nmlflow==" in text and "\npytest==" in text and text.startswith("# Python 3.")


def test_the_delta_is_the_shortest_flags_that_lead_from_the_registered_recipe(tmp_path, store):
    recipe = get("lvdm-short-sky-tiny --lr 1e-3 --seed 5")
    tracker = opened(tmp_path / "run", store, recipe, argv=("run", "lvdm-short-sky-tiny", "--lr", "1e-3"))
    tracker.close("FINISHED")
    tags = content(store, tracker.run_id)["tags"]
    assert sorted(tags["recipe.delta"].split("--")) == ["", "lr 0.001 ", "seed 5"]
    assert get(f"lvdm-short-sky-tiny {tags['recipe.delta']}") == recipe
    assert tags["command"] == "python -m registry run lvdm-short-sky-tiny --lr 1e-3"
    assert tags["recipe.delta"] in tags["mlflow.note.content"]


def test_sending_everything_again_changes_nothing(closed, store):
    before = content(store, closed.run_id)
    for _ in range(2):
        (closed.folder / "synced.json").unlink()
        again = Replica(closed.folder, store)
        again.connect()
        while again.ship():
            pass
        assert again.run_id == closed.run_id and again.left() == 0
    assert content(store, closed.run_id) == before and len(runs_of(store)) == 1


class Breaking:
    """A real client whose connection breaks for good at call number `at`: before it, or after the store did it."""

    def __init__(self, client: MlflowClient, at: int, after: bool) -> None:
        self.client, self.left, self.after = client, at, after

    def __getattr__(self, attribute):
        call = getattr(self.client, attribute)

        def counted(*args, **kwargs):
            self.left -= 1
            if self.left < 0 or (self.left == 0 and not self.after):
                raise ConnectionError("cut")
            done = call(*args, **kwargs)
            if self.left == 0:
                raise ConnectionError("cut")
            return done

        return counted


def test_a_sending_cut_at_any_call_ends_in_the_same_content(closed, store, tmp_path, _migrated_store):
    wanted = content(store, closed.run_id)
    target = f"sqlite:///{tmp_path}/mlflow.db"  # the same file: each cut begins a copy under another uid
    journal = closed.journal.path.read_text()
    for after in (False, True):
        for at in range(1, 80):
            folder = tmp_path / f"cut-{after}-{at}"
            _copy(closed.folder, folder)
            (folder / FILE_NAME).write_text(journal.replace(run_facts(closed.folder)["uid"], f"uid-{after}-{at}"))
            broken = Replica(folder, target)
            broken._client = Breaking(broken.mlflow, at, after)
            try:
                broken.connect()
                while broken.ship():
                    pass
            except ConnectionError:
                whole = Replica(folder, target)
                whole.connect()
                while whole.ship():
                    pass
                found = content(target, whole.run_id)
                assert _same(found, wanted), (at, after)
            else:
                assert at > 15  # there were so many calls to cut
                break
    mine = [run.data.tags["uid"] for run in runs_of(target)]
    assert len(mine) == len(set(mine))


def _copy(source, target):

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("run.json", "synced.json"))


def _same(found: dict, wanted: dict) -> bool:
    found, wanted = ({k: v for k, v in each.items() if k != "tags"} for each in (found, wanted))
    return found == wanted


def test_a_kill_between_making_the_run_and_noting_its_id_leaves_one_run(tmp_path, store):
    first = opened(tmp_path / "run", store)
    first.metrics({"loss": 1.0}, 1)
    first.close("KILLED")
    facts = run_facts(tmp_path / "run")
    (tmp_path / "run" / "synced.json").unlink()
    write_facts(tmp_path / "run", {k: v for k, v in facts.items() if k != "run_id"})
    second = opened(tmp_path / "run", store)
    second.close("FINISHED")
    assert second.run_id == first.run_id == run_facts(tmp_path / "run")["run_id"]
    assert [run.info.status for run in runs_of(store)] == ["FINISHED"]


def test_a_run_that_goes_on_is_the_same_run_with_the_points_of_one(tmp_path, store):
    first = opened(tmp_path / "run", store, argv=("run", "lvdm-short-sky-tiny"))
    for step in range(1, 8):
        first.metrics({"loss": 1.0 / step}, step)
    first.close("KILLED")
    second = opened(tmp_path / "run", store, argv=("resume", "run"))  # its checkpoint was of step 4
    for step in range(5, 11):
        second.metrics({"loss": 1.0 / step}, step)
    second.close("FINISHED")
    history = points(MlflowClient(tracking_uri=store), second.run_id, "loss")
    assert second.run_id == first.run_id and [step for step, *_ in history] == list(range(1, 11))
    tags = content(store, second.run_id)["tags"]
    assert tags["command"].endswith("run lvdm-short-sky-tiny") and tags["resumed.command"].endswith("resume run")


def test_another_store_gets_a_whole_copy_and_the_first_is_left_alone(closed, store, tmp_path, _migrated_store):

    before = content(store, closed.run_id)
    (tmp_path / "other").mkdir()
    shutil.copy(_migrated_store, tmp_path / "other" / "mlflow.db")
    other = Replica(closed.folder, f"sqlite:///{tmp_path}/other/mlflow.db")
    other.connect()
    while other.ship():
        pass
    assert _same(content(other.uri, other.run_id), before) and content(store, closed.run_id) == before
    assert run_facts(closed.folder)["store"] == without_password(store)


# ------------------------------------------------------------------------------------------- what MLflow refuses or spoils


def test_long_and_many_params_are_whole_batches_cut_with_a_mark_that_shows_a_change(tmp_path, store):
    tracker = opened(tmp_path / "run", store)
    many = {f"more.{n}": str(n) for n in range(250)}
    tracker.append("params", values=many | {"long": "x" * 9000})
    tracker.close("FINISHED")
    params = content(store, tracker.run_id)["params"]
    assert (
        many.items() <= params.items() and len(params["long"]) == PARAM_LIMIT and "9,000 characters" in params["long"]
    )
    assert cut("x" * 9000, 100) != cut("x" * 8999 + "y", 100) and cut("short", 100) == "short"


def test_a_param_that_changed_on_resume_is_a_tag_and_the_others_are_not_refused(tmp_path, store):
    opened(tmp_path / "run", store).close("KILLED")
    again = opened(tmp_path / "run", store, get("lvdm-short-sky-tiny --max-steps 77"))
    again.append("params", values={"brand.new": "1"})
    again.close("FINISHED")
    found = content(store, again.run_id)
    first = str(get("lvdm-short-sky-tiny").loop.max_steps)
    assert found["params"]["loop.max_steps"] == first and found["params"]["brand.new"] == "1"
    assert found["tags"]["changed.loop.max_steps"] == f"77 (first {first})"
    assert found["tags"]["recipe.delta"] == "--max-steps 77"


def test_infinity_is_a_gap_in_the_chart_and_itself_in_the_journal(tmp_path, store):
    tracker = opened(tmp_path / "run", store)
    for step, value in enumerate((1.0, math.inf, -math.inf, math.nan, 2.0)):
        tracker.metrics({"loss": value}, step)
    tracker.close("FINISHED")
    history = points(MlflowClient(tracking_uri=store), tracker.run_id, "loss")
    assert [value for *_, value in history] == [1.0, "nan", "nan", "nan", 2.0]
    values = [e["values"]["loss"] for e, _ in read(tracker.journal.path) if e["event"] == "metrics"]
    assert values[1:3] == [math.inf, -math.inf] and math.isnan(values[3])


def test_names_that_mlflow_refuses_are_fitted_and_stay_apart(tmp_path, store):
    odd = ["loss@all", "loss#all", "a//b", "../up", "/root", ".", "", "Ä", "x" * 300, "x" * 301, "plain/name-1.a: b"]
    tracker = opened(tmp_path / "run", store)
    tracker.metrics({each: float(n) for n, each in enumerate(odd)}, 1)
    tracker.tags({f"{each}!": "v" for each in odd})
    tracker.append("params", values={f"p?{each}": "v" for each in odd})
    tracker.close("FINISHED")
    found = content(store, tracker.run_id)
    assert len({name(each) for each in odd}) == len(odd) and name("plain/name-1.a: b") == "plain/name-1.a: b"
    assert {k: v[0][0][2] for k, v in found["metrics"].items()} == {name(each): float(n) for n, each in enumerate(odd)}
    assert tracker.replica.skipped == []


def test_what_is_refused_by_itself_is_left_out_and_said_and_the_rest_goes_on(tmp_path, store, capsys):
    tracker = opened(tmp_path / "run", store)
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        database.execute(
            "CREATE TRIGGER no_loss BEFORE INSERT ON metrics WHEN NEW.key = 'loss' "
            "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
    tracker.metrics({"loss": 1.0}, 1)
    tracker.artifact(tmp_path / "run" / "gone.txt")
    tracker.metrics({"lr": 1.0}, 1)
    tracker.close("FINISHED")
    found = content(store, tracker.run_id)
    assert found["status"] == "FINISHED" and "lr" in found["metrics"] and "loss" not in found["metrics"]
    assert len(tracker.replica.skipped) == 2 and tracker.replica.left() == 0
    assert "MLflow did not take 2 items" in capsys.readouterr().err


def test_files_are_owed_while_only_the_artifact_store_is_down_and_sent_when_it_is_back(tmp_path, store):
    (tmp_path / "mlartifacts").write_text("in the way of the folder")
    tracker = opened(tmp_path / "run", store)
    everything(tracker)
    tracker.close("FINISHED")
    found = content(store, tracker.run_id)
    assert found["status"] == "FINISHED" and len(found["metrics"]["loss"][0]) == 3 and found["tags"]["mood"] == "good"
    assert found["artifacts"] == [] and tracker.replica.left() >= 4
    (tmp_path / "mlartifacts").unlink()
    again = Replica(tracker.folder, store)
    assert send(again) == 0 and again.left() == 0
    found = content(store, tracker.run_id)
    assert {"recipe.json", "run.log"} <= {path for path, _ in found["artifacts"]} and len(found["models"]) == 1


def test_a_thousand_points_a_request_and_not_one_more(tmp_path, store):
    tracker = opened(tmp_path / "run", store)
    for step in range(700):
        tracker.metrics({"a": 1.0, "b": 2.0, "c": 3.0}, step)
    tracker.metrics({f"many/{n}": 1.0 for n in range(1500)}, 1)
    tracker.close("FINISHED")
    client = MlflowClient(tracking_uri=store)
    assert len(client.get_metric_history(tracker.run_id, "c")) == 700
    assert len(client.get_run(tracker.run_id).data.metrics) == 1503


# ---------------------------------------------------------------------------------------------------- pictures and models


def test_checkpoints_that_were_not_kept_are_no_models_any_more(tmp_path, store):

    tracker = opened(tmp_path / "run", store)
    for step in (2, 4, 6):
        tracker.metrics({"loss": 1.0 / step}, step)
        checkpoint(tracker, step)
        deadline = time.monotonic() + 200
        while tracker.replica.left() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert len(content(store, tracker.run_id)["models"]) == 3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    tracker.close("FINISHED")
    models = content(store, tracker.run_id)["models"]
    assert [model for model, *_ in models] == [f"step-0000000{step}-lvdm-short-sky-tiny" for step in (4, 6)]
    client = MlflowClient(tracking_uri=store)
    (model, _) = client.search_logged_models(["1"], filter_string=f"source_run_id = '{tracker.run_id}'")
    assert model.params["step"] in ("4", "6") and model.model_type == "checkpoint"


def test_a_series_of_pictures_has_one_of_each_step_and_clip(tmp_path, store):
    tracker = opened(tmp_path / "run", store)
    for step in (10, 20):
        for cell in (0, 1):
            picture(tracker, step, cell)
    tracker.close("KILLED")
    again = opened(tmp_path / "run", store)
    picture(again, 20, 0)  # computed again after a kill
    again.close("FINISHED")
    names = [
        path.partition("+timestamp")[0]
        for path, _ in artifacts(MlflowClient(tracking_uri=store), again.run_id, "images")
    ]
    assert sorted(set(names)) == [f"images/samples~{cell}+step+{step}" for cell in (0, 1) for step in (10, 20)]
    assert len(names) == 8 and content(store, again.run_id)["tags"]["mlflow.loggedImages"] == "True"
