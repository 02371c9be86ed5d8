"""The text encoder: the numbers of transformers' own, from whatever folder or checkpoint its weights come in."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from core.errors import UserError
from core.models.clip_text import CLIPTextEncoder
from tests.models.tiny_text import SIZES, byte_tokenizer, tiny_text, write_text

CAPTIONS = ["a red sky", "", "clouds that drift to the left, faster than before"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def _loaded(spec, **options):
    encoder = CLIPTextEncoder(tiny_text(**options))
    encoder.load(str(spec))
    return encoder.eval()


def test_the_full_size_is_that_of_vit_l_14():
    from core.slots import CLIPText

    with torch.device("meta"):
        encoder = CLIPText().build()
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    assert len(encoder.state_dict()) == 196
    assert encoder(["a", "b"]).shape == (2, 77, 768)


@torch.no_grad()
def test_states_are_the_last_hidden_states_of_transformers_own_classes(folder):
    stock = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (3, 12)
    assert torch.equal(_loaded(folder)(CAPTIONS), stock(ids).last_hidden_state)


def test_states_end_with_the_final_norm(folder):
    encoder = _loaded(folder)
    norm = encoder.model.get_submodule("final_layer_norm" if hasattr(encoder.model, "final_layer_norm") else "text_model.final_layer_norm")  # fmt: skip
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.constant_(norm.bias, 7.0)
    assert (encoder(CAPTIONS) == 7.0).all()


def test_padding_is_attended_to_as_in_the_published_models(folder):
    """No mask is passed: what stands after the caption has states of its own that differ from token to token."""
    states = _loaded(folder)([""])[0]
    assert (states[2:] - states[1]).abs().amax(1).min() > 1e-3


def test_a_caption_does_not_depend_on_its_batch(folder):
    encoder = _loaded(folder)
    alone = torch.cat([encoder([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(encoder(CAPTIONS), alone, rtol=0.0, atol=1e-5)


def _transformers_folder(folder, tmp_path):
    """Both in one folder, as transformers' hub repositories have them."""
    shutil.copytree(folder / "text_encoder", tmp_path / "flat")
    shutil.copytree(folder / "tokenizer", tmp_path / "flat", dirs_exist_ok=True)
    return tmp_path / "flat"


def _without_prefix(folder, tmp_path):
    flat = _transformers_folder(folder, tmp_path)
    state = load_file(flat / "model.safetensors")
    assert all(name.startswith("text_model.") for name in state)
    save_file({name.removeprefix("text_model."): t for name, t in state.items()}, flat / "model.safetensors")
    return flat


def _with_a_picture_side(folder, tmp_path):
    """A full CLIP, whose text side is ours."""
    flat = _transformers_folder(folder, tmp_path)
    text = json.loads((flat / "config.json").read_text())
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    state = CLIPModel(CLIPConfig(text_config=text, vision_config=small)).state_dict()
    ids = torch.arange(12)[None]
    own = load_file(flat / "model.safetensors")
    save_file(state | own | {"text_model.embeddings.position_ids": ids}, flat / "model.safetensors")
    (flat / "config.json").write_text(json.dumps({"text_config": text, "projection_dim": 512}))
    return flat


def _within_a_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run" / "export")
    return tmp_path / "run"


@pytest.mark.parametrize("layout", [_transformers_folder, _without_prefix, _with_a_picture_side, _within_a_run])
def test_every_layout_of_a_folder_gives_the_same_states(folder, tmp_path, layout):
    assert torch.equal(_loaded(layout(folder, tmp_path))(CAPTIONS), _loaded(folder)(CAPTIONS))


def test_a_tokenizer_of_two_files_is_read_too(folder, tmp_path):
    flat = _transformers_folder(folder, tmp_path)
    vocabulary = byte_tokenizer().get_vocab()
    (flat / "tokenizer.json").unlink()
    (flat / "vocab.json").write_text(json.dumps(vocabulary))
    (flat / "merges.txt").write_text("#version: 0.2\n")
    assert torch.equal(_loaded(flat)(CAPTIONS), _loaded(folder)(CAPTIONS))


def test_the_encoder_in_a_full_checkpoint_of_the_authors_is_read_with_a_tokenizer_beside_it(folder, tmp_path):
    state = load_file(folder / "text_encoder" / "model.safetensors")
    full = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in state.items()}
    full |= {"model.diffusion_model.out.0.weight": torch.zeros(3), "betas": torch.zeros(1000)}
    full["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save({"state_dict": full}, tmp_path / "t2v.ckpt")
    with pytest.raises(UserError, match="no tokenizer in it"):
        _loaded(tmp_path / "t2v.ckpt")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    assert torch.equal(_loaded(tmp_path / "t2v.ckpt")(CAPTIONS), _loaded(folder)(CAPTIONS))


def test_what_is_written_comes_back_bit_for_bit(folder, tmp_path):
    encoder = _loaded(folder)
    encoder.write(tmp_path, encoder.state_dict())
    again = _loaded(tmp_path)
    assert torch.equal(again(CAPTIONS), encoder(CAPTIONS))
    assert (tmp_path / "text_encoder" / "model.safetensors").stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------------------------------- what is refused


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(UserError, match=r"no tokenizer in it .* name the folder that has text_encoder/ and tokenizer/"):
        _loaded(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_act", "gelu"), ("num_attention_heads", 4), ("intermediate_size", 64)]
)
def test_a_config_that_says_something_else_is_refused_by_name(folder, field, value):
    with pytest.raises(UserError, match=rf"config\.json has {field} {SIZES.get(field, 'quick_gelu')!r}, the recipe's"):
        _loaded(folder, **{field: value})


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(folder, tmp_path):
    write_text(tmp_path / "small", vocab_size=300)
    with pytest.raises(UserError, match="the tokenizer has 514 tokens, the text encoder knows 300"):
        _loaded(tmp_path / "small", vocab_size=300)


def test_tensors_that_are_missing_or_left_over_are_named(folder, tmp_path):
    flat = _transformers_folder(folder, tmp_path)
    state = load_file(flat / "model.safetensors")
    state["text_model.extra.weight"] = state.pop("text_model.final_layer_norm.bias")
    save_file(state, flat / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: \S*final_layer_norm\.bias; 1 unused: extra\.weight"):
        _loaded(flat)


def test_an_encoder_without_its_weights_says_so():
    with pytest.raises(UserError, match=re.escape("has no tokenizer yet: its weights were not loaded")):
        CLIPTextEncoder(tiny_text())(["a"])
