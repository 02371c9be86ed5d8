"""`weights info`, `import` and `export` on a real run: what goes out comes back bit for bit, averaged or raw."""

import json

import pytest
import torch
from safetensors.torch import load_file

import registry
from core.checkpoint import checkpoints
from core.weights.load import read_component
from core.weights.stored import open_stored
from tests.engine.processes import run_ranks
from tests.engine.running import run_here, short


@pytest.fixture(scope="module")
def run(sky, _migrated_store, tmp_path_factory):
    """A run of the sky twin whose average is not its raw weights."""
    folder = tmp_path_factory.mktemp("exported")
    store = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(_migrated_store.read_bytes())
    return run_here(
        short("lvdm-short-sky-tiny", sky, "--lr 1e-2 --max-steps 2 --global-batch 2"), folder / "run", store
    ), store


def _weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def _equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def _of_checkpoint(out, kind):
    state = open_stored(checkpoints(out / "checkpoints")[0]).tensors
    return {n.removeprefix(f"{kind}.unet."): e.read() for n, e in state.items() if n.startswith(f"{kind}.unet.")}


def _export(capsys, *words):
    assert registry.main(["weights", "export", *map(str, words)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_export_is_the_average_unless_raw_is_asked_for(run, tmp_path, capsys):
    result, store = run
    out = result.output_dir
    averaged, raw = _of_checkpoint(out, "ema"), _of_checkpoint(out, "weights")
    assert not torch.equal(averaged["out.2.bias"], raw["out.2.bias"])
    assert "averaged" in _export(capsys, f"run:{result.run_id}", "--to", tmp_path / "a", "--store", store)
    _equal(_weights(tmp_path / "a" / "unet"), averaged)
    _equal(_weights(tmp_path / "a" / "unet"), _weights(out / "export" / "unet"))
    assert "raw" in _export(capsys, out, "--to", tmp_path / "b", "--raw")
    _equal(_weights(tmp_path / "b" / "unet"), raw)
    _export(capsys, checkpoints(out / "checkpoints")[0], "--to", tmp_path / "c")
    _equal(_weights(tmp_path / "c" / "unet"), averaged)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["recipe.json", "scheduler", "unet", "vae"]
    _equal(_weights(tmp_path / "c" / "vae"), _weights(out / "export" / "vae"))


def test_what_is_exported_is_imported_bit_for_bit(run, tmp_path, capsys):
    _export(capsys, run[0].output_dir, "--to", tmp_path / "out")
    assert registry.main(["weights", "import", str(tmp_path / "out"), "--to", str(tmp_path / "in")]) == 0
    for network in ("unet", "vae"):
        _equal(_weights(tmp_path / "in" / network), _weights(tmp_path / "out" / network))
        ours, theirs = (json.loads((tmp_path / d / network / "config.json").read_text()) for d in ("in", "out"))
        assert ours == theirs


def test_import_into_the_networks_of_a_recipe_takes_only_what_fits_them(run, tmp_path, capsys):
    export = str(run[0].output_dir / "export")
    words = ["weights", "import", export, "--as", "unet", "--to"]
    assert registry.main([*words, str(tmp_path / "a"), "--for", "lvdm-short-sky-tiny"]) == 0
    _equal(_weights(tmp_path / "a" / "unet"), _weights(run[0].output_dir / "export" / "unet"))
    assert registry.main([*words, str(tmp_path / "b"), "--for", "lvdm-short-sky"]) == 2
    assert "does not fit LVDMUNet" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_raw_and_averaged_weights_of_a_run_are_named_by_a_prefix(run, kind, monkeypatch):
    result, store = run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    places = [f"run:{result.run_id}", result.run_id, str(result.output_dir)]
    places.append(str(checkpoints(result.output_dir / "checkpoints")[0]))
    expected = _of_checkpoint(result.output_dir, kind)
    for place in places:
        state, _ = read_component(f"{'raw' if kind == 'weights' else 'ema'}:{place}", "unet")
        _equal({name: entry.read() for name, entry in state.items()}, expected)
        if kind == "ema":  # and it is what is taken where nothing is said
            state, _ = read_component(place, "unet")
            _equal({name: entry.read() for name, entry in state.items()}, expected)


def test_info_lists_networks_and_the_recipes_that_they_fit(run, capsys):
    assert registry.main(["weights", "info", str(run[0].output_dir), "--json"]) == 0
    entries = {e["networks"][0]["component"]: e["networks"][0] for e in json.loads(capsys.readouterr().out)}
    assert entries.keys() == {"unet", "vae"}
    assert entries["unet"]["fits"] == ["lvdm-short-sky-tiny"] and "lvdm-video-vae-tiny" in entries["vae"]["fits"]
    assert entries["unet"]["parameters"] == sum(t.numel() for t in _weights(run[0].output_dir / "export/unet").values())
    assert registry.main(["weights", "info", str(checkpoints(run[0].output_dir / "checkpoints")[0])]) == 0
    said = capsys.readouterr().out
    assert "average" in said and "ema:PATH" in said and "LVDM's unconditional UNet" in said


def test_a_run_starts_from_the_moving_average_of_the_authors(run, sky, tmp_path, store):
    """`--init-from ema:FILE` on a checkpoint in their layout; with a learning rate of nothing the weights stay."""
    raw = _of_checkpoint(run[0].output_dir, "weights")
    tensors = {f"model.diffusion_model.{n}": t for n, t in raw.items()}
    tensors |= {f"model_ema.diffusion_model{n.replace('.', '')}": t + 1 for n, t in raw.items()}
    torch.save({"state_dict": tensors}, tmp_path / "short_sky.ckpt")
    recipe = short(
        "lvdm-short-sky-tiny", sky, "--max-steps 1 --global-batch 2 --lr 1e-30 --optim.weight-decay 0 --optim.ema None"
    )
    out = run_here(recipe, tmp_path / "run", store, init_from=f"ema:{tmp_path / 'short_sky.ckpt'}").output_dir
    _equal(_of_checkpoint(out, "weights"), {n: t + 1 for n, t in raw.items()})


def test_a_checkpoint_written_in_pieces_by_two_processes_is_read_whole(sky, tmp_path, store, capsys):
    recipe = short("lvdm-short-sky-tiny", sky, "--max-steps 1 --parallel.shard 2 --batch-size 2")
    out = run_ranks(recipe, 2, tmp_path / "run", store)
    assert len(list(checkpoints(out / "checkpoints")[0].glob("*.safetensors"))) == 2
    _equal(_of_checkpoint(out, "ema"), _weights(out / "export" / "unet"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["weights"], "weights needs info, import, merge, export or push"),
        (["weights", "inof", "x"], "did you mean 'info'?"),
        (["weights", "info", "/no/such"], "there is no such file or folder"),
        (["weights", "import", "shipped:lvdm-video-vae-tiny"], "--to DIR"),
        (["weights", "import", "shipped:lvdm-video-vae-tiny", "--to", "x", "--as", "unet"], "no unet"),
        (["weights", "import", "x", "--ema", "--raw"], "give --ema or --raw"),
        (["weights", "export", "/no/such", "--to", "x"], "/no/such"),
        (["weights", "export", "x"], "--to DIR"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys, tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert registry.main(words) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
