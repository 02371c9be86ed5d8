"""LDM's networks and objective: published sizes, the start that the reference draws, tokens, offset noise."""

import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close
from transformers import BertTokenizer

from core.draw import Draw
from core.errors import UserError
from core.slots import Diffusion, FrameVAE, LDMBert, LDMUNet, Objective
from core.weights.load import SHIPPED
from core.weights.pipelines import shift_into_weights
from core.weights.word_pieces import vocabulary, write_tokenizer
from registry import get

TOKENIZER = "shipped:word-pieces-tiny"
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
LITTLE = {"block_out_channels": (8, 16), "layers_per_block": 1, "num_heads": 2, "context_dim": 32, "norm_num_groups": 4}


def _meta(slot):
    with torch.device("meta"):
        return slot.build()


def _size(module):
    return sum(p.numel() for p in module.parameters()), len(module.state_dict())


@pytest.mark.parametrize(
    ("name", "unet", "text", "with_head"),
    [
        ("ldm-laion400m", (872_300_484, 686), (542_895_360, 420), 581_994_042),
        ("ldm-laion400m-12", (859_520_964, 686), (99_091_200, 160), 122_562_618),
    ],
)
def test_the_networks_have_the_published_sizes(name, unet, text, with_head):
    system = _meta(get(name).system)
    assert {n: _size(m) for n, m in system.trained.items()} == {"unet": unet, "text_encoder": text}
    assert {n: _size(m) for n, m in system.frozen.items()} == {"vae": (83_653_863, 248)}
    stored = system.text.stored(system.text.state_dict())  # of an export: the head that is not trained is there
    assert sum(t.numel() for t in stored.values()) == with_head and len(stored) == text[1] + 2


@pytest.mark.parametrize(
    ("part", "unet", "text"),
    [("down_blocks", 254_200_000, None), ("mid_block", 98_348_800, None), ("up_blocks", 517_677_120, None),
     ("model.layers.0", None, 15_741_440)],
)  # fmt: skip
def test_their_parts_have_the_published_sizes(part, unet, text):
    module = _meta(LDMUNet() if unet else LDMBert())
    assert _size(module.get_submodule(part))[0] == (unet or text)


def test_a_fresh_unet_outputs_exactly_zero_and_so_does_each_of_its_branches():
    unet = LDMUNet(**LITTLE).build()
    assert not unet(torch.randn(2, 4, 1, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 32)).any()
    zero = {name.rpartition(".")[0] for name, p in unet.named_parameters() if not p.any() and "norm" not in name}
    assert {name.rpartition(".")[2] for name in zero} == {"conv_out", "conv2", "proj_out"}
    resnets = [n for n, _ in unet.named_modules() if n.rpartition(".")[0].endswith("resnets")]
    transformers = [n for n, _ in unet.named_modules() if n.rpartition(".")[0].endswith("attentions")]
    assert zero == {"conv_out", *(f"{n}.conv2" for n in resnets), *(f"{n}.proj_out" for n in transformers)}


def test_everything_else_starts_uniform_within_one_over_the_root_of_its_fan_in_and_embeddings_normal():
    torch.manual_seed(0)
    text = LDMBert(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    for module in (text.build(), LDMUNet(**LITTLE).build()):
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.LayerNorm | torch.nn.GroupNorm):
                assert (layer.weight == 1).all() and not layer.bias.any()
            elif isinstance(layer, torch.nn.Embedding):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            elif isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and layer.weight.any():
                bound = layer.weight[0].numel() ** -0.5
                for tensor in (layer.weight, layer.bias):
                    if tensor is not None:
                        assert tensor.abs().max() <= bound * 1.0001, name
                        assert tensor.numel() < 500 or tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), (
                            name
                        )


@torch.no_grad()
def test_frames_go_through_the_stock_unet_one_by_one_each_with_its_clip_s_time_and_text():
    unet = LDMUNet(**LITTLE).build().eval()
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, text = torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, 32)
    y = unet(x, t, text)
    for i in range(3):
        assert_close(y[:, :, i], UNet2DConditionModel.forward(unet, x[:, :, i], t, text).sample, rtol=0, atol=1e-5)


def test_the_text_encoder_is_the_same_in_training_and_evaluation_and_attends_to_padding():
    text = LDMBert(tokenizer=TOKENIZER, **SMALL).build()
    states = text.train()(["a red disc", ""])
    assert states.shape == (2, 77, 32) and torch.equal(states, text.eval()(["a red disc", ""]))
    assert (states[1, 2:] - states[1, 2]).abs().amax(1)[1:].min() > 0  # paddings differ by their places
    states.square().sum().backward()
    assert [name for name, p in text.named_parameters() if p.grad is None] == []


def test_the_empty_caption_is_two_marks_and_padding_and_long_captions_are_cut():
    text = LDMBert(tokenizer=TOKENIZER, **SMALL).build()
    ids = text.tokens(["", "a red disc " * 99, "🙂 中文"])
    assert ids[0].tolist() == [2, 3] + [0] * 75
    assert ids.shape == (3, 77) and ids[1, -1] == 3 and (ids[1] != 0).all()
    assert ids[2, 0] == 2 and (ids[2] == 1).any()  # unknown, and no error


def test_the_tokenizer_sets_the_vocabulary(tmp_path):
    assert LDMBert(tokenizer=TOKENIZER, **SMALL).build().config.vocab_size == len(vocabulary()) == 162
    assert _meta(LDMBert()).config.vocab_size == 30522
    write_tokenizer(tmp_path / "tokenizer", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "红", "云"])
    for place in (tmp_path, tmp_path / "tokenizer"):  # a pipeline's folder, or the tokenizer's own
        text = LDMBert(tokenizer=str(place), max_length=6, **SMALL).build()
        assert text.config.vocab_size == 7 and text.tokens(["红云 x"]).tolist() == [[2, 5, 6, 1, 3, 0]]
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()  # as ppdiffusers and old hub folders have it
    assert LDMBert(tokenizer=str(tmp_path), max_length=6, **SMALL).build().tokens(["红云"])[0, 1] == 5


def test_the_words_of_synthetic_captions_are_one_piece_each():
    from data.synthetic_captions import COMBINATIONS, PHRASES, caption

    tokenizer = BertTokenizer.from_pretrained(SHIPPED / "word-pieces-tiny")
    texts = {caption(seed, words) for seed in range(len(PHRASES)) for words in COMBINATIONS}
    assert not [
        piece for text in texts for piece in tokenizer.tokenize(text) if piece.startswith("##") or piece == "[UNK]"
    ]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nowhere", "tokenizer 'nowhere': there is no such folder; for example: hf download google-bert/bert-base-uncased"),
        ("bert-base-uncased", "there is no such folder"),
        (".", "neither tokenizer.json nor vocab.txt is in it"),
        ("broken", "cannot be read as BERT's|has 0 entries"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_none_is_refused_in_one_line(spec, why, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=why) as error:
        LDMBert(tokenizer=spec, **SMALL).build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("slot", "wrong", "why"),
    [(LDMBert, {"max_length": 2}, "max_length"), (LDMBert, {"head_dim": 0}, "head_dim"), (LDMBert, {"dropout": 1.0}, "dropout"),
     (LDMUNet, {"num_heads": 3}, "num_heads"), (LDMUNet, {"norm_num_groups": 33}, "block_out_channels"),
     (LDMUNet, {"context_dim": 0}, "context_dim"), (Objective, {"noise_offset": -0.1}, "noise_offset")],
)  # fmt: skip
def test_sizes_that_cannot_be_built_are_refused(slot, wrong, why):
    with pytest.raises(UserError, match=why):
        slot(**wrong)


# ---------------------------------------------------------------------------------------------------------- the objective


def _system(**objective):
    slot = Diffusion(
        autoencoder=FrameVAE(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        denoiser=LDMUNet(**LITTLE),
        conditions=(LDMBert(tokenizer=TOKENIZER, **SMALL),),
        objective=Objective(**objective),
    )
    torch.manual_seed(0)
    return slot.build()


def _batch(n):
    return {"pixel_values": torch.zeros(n, 3, 1, 32, 32), "caption": ["a disc"] * n}


@torch.no_grad()
def test_a_fresh_model_s_loss_is_that_of_predicting_nothing():
    draw = Draw.training(0, 0, list(range(256)), 256)
    loss, _ = _system().loss(_batch(256), draw)
    assert loss.item() == pytest.approx(1.0, abs=0.04)


@torch.no_grad()
def test_offset_noise_is_one_number_a_channel_in_the_noise_and_in_the_target():
    """A fresh network predicts 0, so the loss is the mean square of the target: 1 + offset^2."""
    draw = Draw.training(0, 0, list(range(256)), 256)
    plain, offset = (_system(noise_offset=amount).loss(_batch(256), draw)[0].item() for amount in (0.0, 0.5))
    assert offset - plain == pytest.approx(0.25, abs=0.04)
    seen = []
    system = _system(noise_offset=0.1)
    system.schedule.add_noise = lambda x0, noise, t: seen.append(noise) or noise
    system.loss(_batch(2), Draw.training(0, 0, [0, 1], 2))
    plain = Draw.training(0, 0, [0, 1], 2).noise(seen[0].shape[1:])
    moved = seen[0] - plain  # (B, C, 1, H, W)
    assert moved.flatten(2).std(2).max() < 1e-6 and moved.flatten(2).mean(2).unique().numel() == 2 * 4


def test_data_that_bring_states_of_captions_are_refused_where_the_text_encoder_learns():
    batch = _batch(1) | {"text_states": torch.zeros(1, 77, 32)}
    with pytest.raises(UserError, match="this recipe trains its text encoder"):
        _system().loss(batch, Draw.training(0, 0, [0], 1))


@torch.no_grad()
def test_an_autoencoder_whose_shift_is_in_its_weights_has_the_same_latents_and_pictures(tmp_path):
    from core.weights.folder import write_folder
    from core.weights.load import load_component

    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    vae = FrameVAE(**sizes, scale_factor=0.4, shift_factor=1.2).build().eval()
    write_folder(vae, tmp_path, vae.state_dict())
    shift_into_weights(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["shift_factor"] == 0.0
    plain = FrameVAE(**sizes, scale_factor=0.4, shift_factor=0.0).build().eval()
    load_component(plain, str(tmp_path), "vae")
    x, z = torch.randn(2, 3, 1, 16, 16), torch.randn(2, 4, 1, 8, 8)
    assert_close(plain.to_latents(plain.encode(x).mean), vae.to_latents(vae.encode(x).mean), rtol=0, atol=1e-5)
    assert_close(plain.encode(x).logvar, vae.encode(x).logvar, rtol=0, atol=0)
    assert_close(plain.decode(plain.from_latents(z)), vae.decode(vae.from_latents(z)), rtol=0, atol=1e-4)
    assert math.isclose(vae.to_latents(torch.zeros(1)).item(), 0.48, rel_tol=1e-6)
