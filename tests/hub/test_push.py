"""Weights on the hub: in the background of a run, by hand afterwards, and what happens when the hub does not take them."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load, load_file

import registry
from core.errors import UserError
from core.hub import Hub, Unreachable
from core.journal import read
from core.pushing import Pusher
from core.slots import Launch
from core.slots.slot import SlotError
from core.train import train
from tests.engine.running import flags, run_here, short
from tests.hub.standin import HubState, serving
from tests.tracking.servers import deaf

TOKEN = "hf_" + "PlantedHubTokenOfPushing"
RUN = "lvdm-short-sky-tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A hub that this process and its children push to."""
    with serving(TOKEN) as state:
        use(monkeypatch, state.address)
        yield state


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read when it was imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


def events(out: Path, kind: str = "hub") -> list[dict]:
    return [event for event, _ in read(out / "journal.jsonl") if event["event"] == kind]


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def pushed(sky, _migrated_store, tmp_path_factory):
    """A run of two updates that pushed in the background, to a hub that refuses its checkpoint and takes its export."""
    out = tmp_path_factory.mktemp("pushed") / "run"
    store = f"sqlite:///{out.parent}/mlflow.db"
    (out.parent / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    more = "--max-steps 2 --validation.every 2 --optim.ema None"
    with pytest.MonkeyPatch.context() as patch, serving(TOKEN) as state:
        use(patch, state.address)
        state.faults = {'"summary": "step-00000002/step 2': [-403]}
        words = flags(RUN, sky, more)
        recipe = registry.get(words[0], *words[1:])
        result = train(
            recipe,
            Launch(
                output_dir=out, store=store, device="cpu", push_to_hub="all", hub_repo="me/clouds", hub_private=True
            ),
            ["run", *words, "--hub-token", TOKEN],
        )
    return result, state


def test_a_run_pushes_its_checkpoints_and_its_export_with_a_card(pushed):
    result, state = pushed
    out = result.output_dir
    assert state.repos == {"me/clouds": True}
    assert [summary for summary, _ in state.commits] == ["export: weights and card"]
    export = {path.relative_to(out / "export").as_posix(): path.read_bytes() for path in files(out / "export")}
    assert export == {name: state.files[name] for name in export}
    assert state.files["samples/samples.gif"] == (out / "samples/step-00000002/samples.gif").read_bytes()
    assert set(state.files) == {"README.md", "samples/samples.gif", *export}
    assert {"unet/diffusion_pytorch_model.safetensors", "vae/config.json", "recipe.json"} < set(export)


def test_a_push_that_fails_is_a_line_and_an_event_and_the_run_finishes(pushed):
    result, state = pushed
    out = result.output_dir
    log = (out / "run.log").read_text()
    assert result.step == 2 and "finished at step 2" in log and not (out / "hub").exists()
    (failed, *done) = events(out)
    assert (failed["status"], failed["what"]) == ("failed", "step-00000002") and "403" in failed["why"]
    assert [(e["status"], e["what"]) for e in done] == [("pushed", "export")]
    assert all(e["repo"] == "me/clouds" and e["address"].startswith(state.address) for e in done)
    (line,) = [line for line in log.splitlines() if "is not on the hub" in line]
    assert f"later: python -m registry weights push {out} --repo me/clouds --every --private" in line


def test_the_card_says_recipe_data_metrics_samples_and_use(pushed):
    result, state = pushed
    text = state.files["README.md"].decode()
    head, body = text.split("---\n")[1:3]
    assert "library_name: diffusers" in head and f"- {RUN}" in head and "pipeline_tag" not in head  # no word for it
    assert "# clouds" in body and "Twin of lvdm-short-sky" in body and "![samples](samples/samples.gif)" in body
    assert f"`{RUN}` with `" in body and "--max-steps 2" in body
    rows = {line.split("|")[1].strip(): line for line in body.splitlines() if line.startswith("| ")}
    value = next(
        e["values"]["val/loss"] for e in reversed(events(result.output_dir, "metrics")) if "val/loss" in e["values"]
    )
    assert rows["val/loss"] == f"| val/loss | {value:.6g} | 2 |" and "fingerprint" in body
    assert not [name for name in rows if name.startswith(("system/", "time/"))]
    assert "python -m registry sample weights/clouds" in body


def test_the_token_is_in_no_file_of_the_run_nor_on_the_hub(pushed):
    result, state = pushed
    places = [path for path in files(result.output_dir.parent) if TOKEN.encode() in path.read_bytes()]
    assert places == [] and len(files(result.output_dir)) > 20
    assert not [name for name, content in state.files.items() if TOKEN.encode() in content]
    assert not [line for line in state.asked if TOKEN in line]
    assert "--hub-token ***" in (result.output_dir / "journal.jsonl").read_text()


def test_by_hand_every_checkpoint_goes_where_the_run_puts_it(pushed, hub: HubState, capsys):
    out = pushed[0].output_dir
    assert registry.main(["weights", "push", str(out), "--repo", "clouds", "--every"]) == 0
    said = capsys.readouterr().out.split()
    assert said == [f"{hub.address}/me/clouds/commit/{n:040d}" for n in (1, 2)] and hub.repos == {"me/clouds": False}
    assert {name.split("/")[0] for name in hub.files} == {
        *("README.md", "samples", "recipe.json", "scheduler", "unet", "vae", "step-00000002"),
    }
    name = "unet/diffusion_pytorch_model.safetensors"
    ours = load_file(out / "export" / name)
    for theirs in (load(hub.files[name]), load(hub.files[f"step-00000002/{name}"])):
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)
    card = hub.files["README.md"].decode()
    assert "| step | 2 |" in card and "| weights | raw |" in card
    assert not list((out / "hub").iterdir())


def test_an_exported_folder_goes_as_it_is_without_links_that_leave_it(pushed, hub: HubState, tmp_path: Path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(b"weights")
    (folder / "secret.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("not to be pushed")
    (folder / ".hidden").write_text("neither")
    assert registry.main(["weights", "push", str(folder), "--repo", "me/lora", "--inside", "v1"]) == 0
    assert set(hub.files) == {"v1/adapter.safetensors", "README.md"}
    assert (
        hub.files["README.md"].decode().startswith("---\nlibrary_name: diffusers\ntags:\n- diffusion\n---\n\n# lora\n")
    )


# ---- a hub that does not take it ----


def test_a_fault_that_passes_is_tried_again_and_one_that_stays_is_given_up(hub: HubState):
    hub.faults = {"/commit/": [503, 429]}
    repository = Hub("me/a", False, pauses=(0.0, 0.0))
    repository.create()
    assert repository.upload({"a.txt": b"a"}, "first").startswith(hub.address)
    assert [line for line in hub.asked if "commit" in line] == ["POST /api/models/me/a/commit/main"] * 3
    hub.faults = {"/commit/": [-503]}
    with pytest.raises(Unreachable, match=r"does not take me/a after 3 tries: .*503"):
        repository.upload({"a.txt": b"b"}, "second")
    hub.faults, before = {"/commit/": [-403]}, len(hub.asked)
    with pytest.raises(UserError, match=r"the hub refuses me/a: .*403") as refused:
        repository.upload({"a.txt": b"b"}, "third")
    assert not isinstance(refused.value, Unreachable) and hub.files == {"a.txt": b"a"}
    assert len([line for line in hub.asked[before:] if "commit" in line]) == 1


def test_nothing_goes_to_a_public_repository_that_was_to_be_private(hub: HubState, capsys):
    hub.repos["me/open"] = False
    with pytest.raises(UserError, match="me/open is public on the hub, and was to be private"):
        Hub("me/open", True).create()
    hub.repos["me/closed"] = True
    Hub("me/closed", False).create()
    assert hub.repos["me/closed"] is True


def pusher(folder: Path, **launch) -> tuple[Pusher, list[str], list[dict]]:
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    noted: list[dict] = []
    flags = {"push_to_hub": "last", "hub_repo": "me/late"} | launch
    return Pusher(Launch(**flags), folder, said.append, lambda **facts: noted.append(facts)), said, noted


def test_a_wrong_token_is_one_line_at_the_start_and_nothing_is_tried_after(hub: HubState, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "AnotherTokenThatIsWrong")
    background, said, noted = pusher(tmp_path / "run")
    background._thread.join(60)
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    background.saved(tmp_path / "run/checkpoints/step-00000002", last=False)
    background.close(60, lambda: False)
    assert len(said) == len(noted) == 1 and noted[0]["status"] == "failed" and "401" in noted[0]["why"]
    assert said[0].startswith("nothing will be pushed (the hub refuses me/late") and "AnotherToken" not in said[0]
    assert hub.asked == ["POST /api/repos/create", "GET /api/models/me/late"] and not (tmp_path / "run/hub").exists()


def test_the_end_waits_no_longer_than_asked_and_says_what_is_not_there(tmp_path: Path, monkeypatch):
    with deaf() as address:
        use(monkeypatch, address)
        background, said, noted = pusher(tmp_path / "run", push_to_hub="all")
        for step in (2, 4):
            checkpoint = tmp_path / f"run/checkpoints/step-{step:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "state.json").write_text("{}")
            background.saved(checkpoint, last=False)
            assert (tmp_path / "run/hub" / checkpoint.name / "state.json").stat().st_nlink == 2
        background.close(0.3, lambda: False)
    (line,) = said
    assert line.startswith("step-00000002, step-00000004 is not on the hub (the run ended before)")
    assert [fact["status"] for fact in noted] == ["left"] and not (tmp_path / "run/hub").exists()
    assert background._child is not None and background._child.poll() is not None


def test_the_end_does_not_wait_when_the_run_is_asked_to_stop(tmp_path: Path, monkeypatch):
    with deaf() as address:
        use(monkeypatch, address)
        background, said, _ = pusher(tmp_path / "run")
        background.close(3600, lambda: True)
    assert said == []


# ---- what is wrong from the start ----


def test_without_a_token_or_offline_the_run_does_not_start(tmp_path: Path, monkeypatch, sky):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    more = {"push_to_hub": "last", "hub_repo": "me/x"}
    with pytest.raises(UserError, match="--push-to-hub: HF_TOKEN is not set"):
        run_here(short(RUN, sky), tmp_path / "run", "sqlite:///none.db", **more)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids it"):
        run_here(short(RUN, sky), tmp_path / "run", "sqlite:///none.db", **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": "last"}, "say where to: --hub-repo"),
        ({"hub_repo": "me/x"}, "say what goes there: --push-to-hub"),
        ({"push_to_hub": "all", "hub_repo": "https://host/x"}, "expected NAMESPACE/NAME"),
        ({"push_to_hub": "all", "hub_repo": "../x"}, "expected NAMESPACE/NAME"),
        ({"hub_wait": -1.0}, "must not be negative"),
    ],
)
def test_flags_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(SlotError, match=message):
        Launch(**changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x"], "--repo NAMESPACE/NAME says where to"),
        (["x", "--repo", "a/b/c"], "expected NAMESPACE/NAME"),
        (["x", "--repo", "a/b", "--inside", "../up"], "expected a folder of"),
        (["x", "--repo", "a/b", "--inside", "c", "--every"], "--every names the folders itself"),
        (["x", "--repo", "a/b", "--publik"], "unknown flag --publik"),
        ([".", "--repo", "a/b"], "holds no run"),
    ],
)
def test_a_mistake_by_hand_is_one_line(words, message, hub: HubState, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert registry.main(["weights", "push", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and hub.repos == {}
