"""Frozen weights and tokenizers that change between training and what comes after it are seen, wherever they lie."""

import json
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from core import manifest
from core.checkpoint import checkpoints
from core.distributed import ranks
from core.errors import UserError
from core.fingerprint import VALUES, fingerprint, held_against
from core.slots import Parallel
from core.verbs.sample import sample
from core.verbs.weights import export
from core.weights.load import SHIPPED
from tests.engine.processes import SERVER, begin
from tests.engine.running import losses, run_here, short
from tests.tracking.servers import free_port

NAME = "ldm-laion400m-tiny"
FLAGS = "--max-steps 2 --global-batch 2 --checkpoint.every 1 --checkpoint.keep 9"
VAE, WORDS = "system.autoencoder.weights", "system.conditions.0.tokenizer"


def holding(tensor, name="weight"):
    module = nn.Module()
    module.register_buffer(name, tensor)
    return module


# --------------------------------------------------------------------------------------------------------- the function


@given(st.lists(st.integers(1, 9), max_size=3).map(tuple), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_a_change_of_any_value_of_a_small_tensor_shows_and_a_copy_is_the_same(shape, dtype, data):
    values = torch.arange(torch.tensor(shape).prod().item() if shape else 1, dtype=dtype).reshape(shape)
    assert values.numel() <= VALUES
    other = values.clone()
    other.reshape(-1)[data.draw(st.integers(0, values.numel() - 1))] += 0.5 if values.numel() < 200 else 64
    assert fingerprint(holding(values.clone())) == fingerprint(holding(values))
    assert fingerprint(holding(other)) != fingerprint(holding(values))


def test_name_shape_dtype_and_bit_pattern_count_and_layout_in_memory_does_not():
    values = torch.rand(6, 4)
    same = fingerprint(holding(values))
    assert fingerprint(holding(values.T.contiguous().T)) == same
    others = [holding(values, "bias"), holding(values.reshape(4, 6)), holding(values.double()), holding(-values)]
    zeros = [holding(torch.zeros(3)), holding(-torch.zeros(3)), holding(torch.zeros(0))]
    zeros.append(holding(torch.zeros(3, dtype=torch.int32)))
    assert len({same, *map(fingerprint, others), *map(fingerprint, zeros)}) == 9


def test_large_tensors_are_read_at_few_places_in_all_of_their_columns():
    values = torch.zeros(2048, 1024)
    same = fingerprint(holding(values))
    for column in (1, 511, 1023):
        other = values.clone()
        other[:, column] = 1.0
        assert fingerprint(holding(other)) != same
    places = torch.arange(2 * VALUES)
    nowhere = fingerprint(holding(places < 0))
    assert 0 < sum(fingerprint(holding(places == i)) != nowhere for i in places) <= VALUES


# -------------------------------------------------------------------------------------------------------------- in runs


@pytest.fixture(scope="module")
def whole(sky, _migrated_store, tmp_path_factory):
    """A run of two updates whose autoencoder and tokenizer lie in folders of their own."""
    folder = tmp_path_factory.mktemp("prints")
    shutil.copy(_migrated_store, folder / "mlflow.db")
    shutil.copytree(SHIPPED / "kl-vae-tiny", folder / "vae")
    shutil.copytree(SHIPPED / "word-pieces-tiny", folder / "words")
    recipe = short(NAME, sky, f"{FLAGS} --{VAE} {folder}/vae --{WORDS} {folder}/words")
    return recipe, run_here(recipe, folder / "run", f"sqlite:///{folder}/mlflow.db").output_dir


@pytest.fixture
def cut(whole, tmp_path):
    """The recipe and a copy of that run after its first update, with copies of its folders beside it."""
    recipe, run = whole
    for name in ("vae", "words", "run"):
        shutil.copytree(run.parent / name, tmp_path / name)
    for path in ("run.json", "journal.jsonl", "checkpoints/step-00000002"):
        path = tmp_path / "run" / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return recipe, tmp_path / "run"


def at(recipe, vae=None, words=None):
    """The recipe with other places."""
    (text,) = recipe.system.conditions
    return recipe.but(
        system=recipe.system.but(
            autoencoder=recipe.system.autoencoder.but(**({"weights": str(vae)} if vae else {})),
            conditions=(text.but(**({"tokenizer": str(words)} if words else {})),),
        )
    )


def nudged(vae):
    """One layer of the autoencoder becomes another."""
    file = next(vae.rglob("*.safetensors"))
    state = load_file(file)
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"] * 1.01
    save_file(state, file, metadata={"format": "pt"})


def rescaled(vae):
    """`measure-latents --write` has stored other constants."""
    file = next(vae.rglob("config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))


def test_a_checkpoint_holds_what_was_frozen_and_the_tokenizer(whole):
    recipe, run = whole
    for folder in checkpoints(run / "checkpoints"):
        held = json.loads((folder / "state.json").read_text())["frozen"]
        assert held.keys() == {VAE, WORDS}
        assert held[VAE].keys() == {"from", "dtype", "tensors", "constants"}
        assert held[VAE]["dtype"] == "float32" and held[VAE]["from"] == recipe.system.autoencoder.weights


def test_the_same_weights_at_another_place_go_on_bit_for_bit(whole, cut, store):
    recipe, run = cut
    moved = at(recipe, vae=run.parent / "vae", words=run.parent / "words")
    assert run_here(moved, run, store, resume=str(run)).step == 2
    assert losses(run)[2] == losses(whole[1])[2]


@pytest.mark.parametrize(("change", "what"), [(nudged, "tensors"), (rescaled, "constants of the latents")])
def test_other_weights_at_the_same_or_another_place_are_refused_with_what_to_do(cut, store, change, what):
    recipe, run = cut
    change(run.parent / "vae")
    with pytest.raises(UserError, match=rf"{VAE}: what is at \S+/vae is not what .*\({what} changed\)") as error:
        run_here(at(recipe, vae=run.parent / "vae"), run, store, resume=str(run))
    assert f"--{VAE} PATH" in str(error.value) and "--init-from" in str(error.value)


def test_another_vocabulary_of_a_trained_text_encoder_is_refused_too(cut, store):
    recipe, run = cut
    file = run.parent / "words" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{WORDS}: .*\(vocabulary changed\)"):
        run_here(at(recipe, words=run.parent / "words"), run, store, resume=str(run))


def test_what_is_allowed_goes_on_and_the_next_checkpoint_holds_the_new(cut, store):
    recipe, run = cut
    nudged(run.parent / "vae")
    run_here(at(recipe, vae=run.parent / "vae"), run, store, resume=str(run), allow=("system",))
    new, old = (json.loads((p / "state.json").read_text())["frozen"][VAE] for p in checkpoints(run / "checkpoints"))
    assert new["tensors"] != old["tensors"] and new["from"].startswith(str(run.parent))


def test_a_checkpoint_from_before_there_were_fingerprints_is_gone_on_with(cut, store):
    recipe, run = cut
    (folder,) = checkpoints(run / "checkpoints")
    numbers = json.loads((folder / "state.json").read_text())
    del numbers["frozen"]
    (folder / "state.json").write_text(json.dumps(numbers))
    manifest.write(folder, manifest.digests(folder))
    with pytest.raises(UserError, match=f"another recipe: {VAE}"):  # its place is all that is known
        run_here(at(recipe, vae=run.parent / "vae"), run, store, resume=str(run))
    assert run_here(recipe, run, store, resume=str(run)).step == 2


def test_samples_and_exports_say_that_the_weights_are_others_and_where_the_old_are(cut, tmp_path, capsys):
    recipe, run = cut
    moved = at(recipe, vae=run.parent / "vae")
    for folder in (run, *checkpoints(run / "checkpoints")):
        path = folder / "recipe.json"
        path.write_text(path.read_text().replace(recipe.system.autoencoder.weights, moved.system.autoencoder.weights))
    (folder,) = checkpoints(run / "checkpoints")
    manifest.write(folder, manifest.digests(folder))
    notes, told = _sampled(run, tmp_path / "a")
    assert notes == [] and told["frozen"][VAE]["from"] == str(run.parent / "vae")
    nudged(run.parent / "vae")
    capsys.readouterr()
    (note,), _ = _sampled(run, tmp_path / "b")
    said = f"{VAE}: what is at {run.parent}/vae is not what the run was trained with (tensors changed)"
    assert note.startswith(said) and f"{run}/export holds what the run had" in note
    assert note in capsys.readouterr().err
    assert _sampled(run / "export", tmp_path / "c")[0] == []  # it holds its own
    export(str(run), to=tmp_path / "d", raw=False, store=None)
    assert said in capsys.readouterr().err


def _sampled(where, out):
    """Notes on frozen parts, and all that samples.json says."""
    made = sample(str(where), prompt=["a red disc"], device="cpu", log=False, steps=1, output_dir=out)
    told = json.loads((made / "samples.json").read_text())
    return [note for note in told["notes"] if "what is at" in note], told


# ----------------------------------------------------------------------------------------------------------- over ranks


def _read(rank, port, said):
    """What a rank does that has read its own number from its disk."""
    begin(said / "stderr", 1, rank, 2, port)
    with ranks(Parallel(), "cpu", 60.0) as group:
        held_against(None, {VAE: {"from": "vae", "tensors": "the same"}}, (), group)
        try:
            held_against(None, {VAE: {"from": "vae", "tensors": str(rank)}}, (), group)
        except UserError as error:
            (said / str(rank)).write_text(str(error))
    sys.exit(0)


def test_ranks_that_read_different_files_under_one_name_all_say_so(tmp_path):
    port = free_port()
    processes = [SERVER.Process(target=_read, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said == [f"{VAE}: rank 1 reads something else from vae than rank 0"] * 2
