"""A denoiser that is told a text: captions left out, guidance, what is frozen, and what is refused."""

import re

import pytest
import torch
from torch.testing import assert_close

from core.build import load_frozen
from core.draw import Draw
from core.errors import UserError
from core.preflight import frozen_parts, preflight
from core.sampling import guided, sample, told
from core.slots import DDIM, CLIPText, Diffusion, FrameVAE, LVDMShortUNet, LVDMTextUNet, Objective
from registry import get
from tests.models.tiny_text import tiny_text, write_text

UNET = LVDMTextUNet(
    in_channels=3,
    out_channels=3,
    model_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_heads=2,
    context_dim=24,
    temporal_length=2,
    norm_num_groups=4,
)
CLIP = (2, 4, 4)
WORDS = ["red clouds", "blue", "a", "green sky to the left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def _system(folder, **options):
    torch.manual_seed(0)
    system = Diffusion(
        denoiser=UNET, conditions=(tiny_text(weights=str(folder), **options),), objective=Objective()
    ).build()
    system.text.load(str(folder))
    for parameter in system.trained.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return system


def _batch(count=4):
    places = list(range(count))
    video = torch.randn(count, 3, *CLIP, generator=torch.Generator().manual_seed(3))
    words = [WORDS[i % 4] for i in places]
    return {"pixel_values": video, "caption": words, "id": [f"c{i}" for i in places], "place": places}


def _part(batch, first, last):
    return {name: values[first:last] for name, values in batch.items()}


def _heard(system):
    """The captions that reach the text encoder from here on."""
    heard = []
    system.text.register_forward_pre_hook(lambda module, args: heard.extend(args[0]))
    return heard


# --------------------------------------------------------------------------------------------------- captions left out


def test_the_set_share_of_training_captions_is_left_out(folder):
    system = _system(folder, dropout=0.2)
    heard, batch = _heard(system), _batch(64)
    for step in range(12):
        system.loss(batch, Draw.training(0, step, batch["place"], 64))
    assert len(heard) == 768
    assert heard.count("") / len(heard) == pytest.approx(0.2, abs=0.04)
    assert len({tuple(text == "" for text in heard[i : i + 64]) for i in range(0, 768, 64)}) == 12


def test_which_captions_are_left_out_does_not_depend_on_ranks_or_micro_batches(folder):
    system = _system(folder, dropout=0.5)
    batch, heard = _batch(8), _heard(system)
    whole = system.loss(batch, Draw.training(0, 5, batch["place"], 8))[0]
    parts = [_part(batch, *ends) for ends in ((0, 2), (2, 4), (4, 8))]
    losses = [system.loss(p, Draw.training(0, 5, p["place"], 8))[0] * len(p["place"]) / 8 for p in parts]
    assert 0 < heard[:8].count("") < 8
    assert heard[:8] == heard[8:]
    assert_close(sum(losses), whole)


def test_no_caption_is_left_out_by_default_or_in_evaluation(folder):
    batch = _batch(32)
    for dropout, run in ((0.0, "loss"), (0.9, "evaluate")):
        system = _system(folder, dropout=dropout)
        heard = _heard(system)
        getattr(system, run)(batch, Draw.training(0, 0, batch["place"], 32))
        assert heard == batch["caption"]


def test_precomputed_states_give_the_same_loss_and_skip_the_encoder(folder):
    system, batch = _system(folder, dropout=0.5), _batch(8)
    draw = Draw.training(0, 5, batch["place"], 8)
    expected = system.loss(batch, draw)[0]
    states = system.states(batch.pop("caption"))
    heard = _heard(system)
    assert_close(system.loss(batch | {"text_states": states}, draw)[0], expected)
    assert set(heard) == {""}
    assert_close(
        _system(folder).loss(batch | {"text_states": states}, draw)[0], _system(folder).loss(_batch(8), draw)[0]
    )


def test_data_without_captions_are_refused(folder):
    batch = _batch()
    del batch["caption"]
    with pytest.raises(UserError, match="the data give no captions"):
        _system(folder).loss(batch, Draw.training(0, 0, batch["place"], 4))


# ------------------------------------------------------------------------------------------------------------- frozen


def test_the_text_encoder_never_gets_a_gradient_and_is_not_trained(folder):
    system, batch = _system(folder), _batch()
    before = [p.clone() for p in system.text.parameters()]
    system.mode(training=True)
    system.loss(batch, Draw.training(0, 0, batch["place"], 4))[0].backward()
    assert all(p.grad is not None for p in system.trained.parameters())
    assert all(p.grad is None and not p.requires_grad for p in system.text.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, system.text.parameters(), strict=True))
    assert not {id(p) for p in system.trained.parameters()} & {id(p) for p in system.text.parameters()}
    assert not any(module.training for module in system.text.modules())


def test_the_frozen_dtype_is_the_slot_s_own(folder):
    system = _system(folder, dtype="bf16")
    assert {p.dtype for p in system.text.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in system.trained.parameters()} == {torch.float32}
    assert system.states(WORDS).dtype == torch.float32


def test_an_export_has_the_folders_of_a_pipeline_and_loads_again(folder, tmp_path):
    system = _system(folder)
    system.export(tmp_path, {"unet": system.trained["unet"].state_dict()})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scheduler", "text_encoder", "tokenizer", "unet"]
    assert torch.equal(_system(tmp_path).states(WORDS), system.states(WORDS))


# ----------------------------------------------------------------------------------------------------------- guidance


def _made(system, prompts, **sampler):
    draw = Draw.fixed("sample 0", list(range(len(prompts))), list(range(len(prompts))), len(prompts))
    return system.sample(prompts, CLIP, DDIM(num_inference_steps=3, **sampler), draw)


def test_guidance_scale_1_is_the_conditional_and_0_the_unconditional_model(folder):
    system = _system(folder)
    nothing = _made(system, [""] * 4)
    assert not torch.equal(_made(system, WORDS), nothing)
    assert torch.equal(_made(system, WORDS, guidance_scale=0.0), nothing)
    assert torch.equal(_made(system, WORDS, guidance_scale=1.0, negative_prompt="blue"), _made(system, WORDS))
    assert torch.equal(_made(system, WORDS, guidance_scale=0.0, negative_prompt="blue"), _made(system, ["blue"] * 4))
    # a text that leads away from itself leaves the model as it is
    assert_close(_made(system, ["a"], guidance_scale=5.0, negative_prompt="a"), _made(system, ["a"]), rtol=0, atol=1e-4)


def test_guidance_is_one_forward_pass_of_a_doubled_batch(folder):
    system, sizes = _system(folder), []
    system.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    _made(system, WORDS, guidance_scale=1.0)
    _made(system, WORDS, guidance_scale=2.0)
    assert sizes == [4] * 3 + [8] * 3


@torch.no_grad()
def test_one_doubled_pass_is_two_passes(folder):
    system = _system(folder)
    given, nothing = system.states(WORDS), system.states([""] * 4)
    x, t = torch.randn(4, 3, *CLIP), torch.full((4,), 500)
    two = guided(lambda x, t: system.denoiser(x, t, given), lambda x, t: system.denoiser(x, t, nothing), 7.5)
    assert_close(told(system.denoiser, given, nothing, 7.5)(x, t), two(x, t), rtol=1e-4, atol=1e-4)


def test_guidance_without_an_unconditional_prediction_is_refused():
    with pytest.raises(UserError, match="guidance needs an unconditional prediction"):
        sample(lambda x, t: x, torch.zeros(1, 3), None, num_inference_steps=1, guidance_scale=2.0)
    with pytest.raises(UserError, match="guidance needs an unconditional prediction"):
        told(lambda x, t, c: x, torch.zeros(1, 2, 3), None, 2.0)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditions": ()}, r"LVDMTextUNet is told a text: add one, for example --system\.conditions=CLIPText"),
        ({"denoiser": LVDMShortUNet()}, "LVDMShortUNet is told nothing"),
        ({"denoiser": UNET.but(context_dim=32)}, r"context_dim = 32: must be the hidden_size of CLIPText, 24"),
        ({"conditions": (tiny_text(), tiny_text())}, "one text at a time"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Diffusion(denoiser=UNET, conditions=(tiny_text(),)).but(**change)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("max_length", 78),
        ("max_length", 2),
        ("num_attention_heads", 7),
        ("vocab_size", 0),
    ],
)
def test_impossible_values_of_the_text_encoder_are_refused(field, value):
    with pytest.raises(UserError, match=rf"CLIPText\.{field} = "):
        CLIPText(**{field: value})


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--validation.prompts rain", "prompts"),
        ("--validation.sampler.guidance-scale 3", "sampler.guidance_scale"),
        ("--validation.sampler.negative-prompt rain", "sampler.negative_prompt"),
    ],
)
def test_prompts_and_guidance_of_a_recipe_without_a_text_are_refused_before_the_start(flags, field):
    with pytest.raises(UserError, match=rf"validation\.{re.escape(field)}: lvdm-short-sky-tiny is told no text"):
        preflight(get(f"lvdm-short-sky-tiny {flags}"))


def test_a_negative_guidance_scale_is_refused():
    with pytest.raises(UserError, match="guidance_scale"):
        DDIM(guidance_scale=-1.0)


# ------------------------------------------------------------------------------------------- what is missing at the start


def test_a_start_without_weights_names_every_frozen_part_and_flags_that_work(folder):
    recipe = get("lvdm-text2video")
    with pytest.raises(UserError) as refused:
        preflight(recipe)
    screen = str(refused.value)
    assert [path for path, _ in frozen_parts(recipe)] == ["system.autoencoder", "system.conditions.0"]
    for part in ("system.autoencoder", "system.conditions.0"):
        assert f"{part}.weights is not set" in screen
    assert "openai/clip-vit-large-patch14" in screen
    flags = re.findall(r"then: +(--\S+) <", screen)
    assert flags == ["--system.autoencoder.weights", "--system.conditions.0.weights", "--data-root"]
    given = get("lvdm-text2video", *(word for flag in flags for word in (flag, str(folder))))
    assert (given.system.autoencoder.weights, given.system.conditions[0].weights) == (str(folder),) * 2
    preflight(given)


def test_frozen_parts_without_weights_are_refused_by_name(folder):
    recipe = get("lvdm-short-sky-tiny")
    system = Diffusion(denoiser=UNET, conditions=(tiny_text(),))
    with pytest.raises(UserError, match=r"system\.conditions\.0\.weights is not set"):
        load_frozen(recipe.but(system=system), system.build())


def test_the_full_recipe_has_the_frame_autoencoder_and_the_published_constants():
    system = get("lvdm-text2video").system
    assert isinstance(system.autoencoder, FrameVAE)
    assert (system.autoencoder.scale_factor, system.autoencoder.shift_factor) == (0.18215, 0.0)
