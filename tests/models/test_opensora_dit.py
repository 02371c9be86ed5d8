"""Open-Sora-Plan's transformer: its size, how it starts, what sparse attention connects, what is masked, its slot."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core.draw import Draw
from core.errors import UserError
from core.models.opensora_dit import OpenSoraDiT, gathered, scattered
from core.slots import Diffusion, EulerAncestral, FlowMatchEuler, Objective
from core.slots import OpenSoraDiT as Slot
from tests.models.drawn import awake, noise, parts_are, size
from tests.models.tiny_text import tiny_text, write_text

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "caption_channels": 24,
    "sparse_n": 2,
}
X, TEXT, T = noise(2, 4, 3, 4, 6), noise(2, 7, 24, seed=2), torch.tensor([5, 900])


def _full(**options):
    with torch.device("meta"):
        return Slot(**options).build()


# ---------------------------------------------------------------------------------------------------- size and start


def test_the_full_size_is_the_published_one():
    full = _full()
    assert (size(full), len(full.state_dict())) == (2_771_981_600, 687)
    parts_are(
        full,
        ("pos_embed", 76_032, 2),
        ("caption_projection", 14_750_208, 4),
        ("adaln_single", 37_767_168, 6),
        ("transformer_blocks", 2_719_309_824, 32 * 21),
        ("proj_out", 73_760, 2),
    )
    block = full.transformer_blocks[0]
    parts_are(block, ("attn1", 21_242_880, 8), ("attn2", 21_242_880, 8), ("ff", 42_478_848, 4))
    assert [i for i, block in enumerate(full.blocks()) if block.attn1.parts == 1] == [0, 1, 30, 31]
    assert [block.attn1.run for block in full.blocks()[2:6]] == [1, 4, 1, 4]


@pytest.mark.parametrize(("channels", "parameters"), [(4, 2_771_907_856), (16, 2_772_129_088), (32, 2_772_424_064)])
def test_other_latent_channels_have_their_published_size(channels, parameters):
    assert size(_full(in_channels=channels, out_channels=channels)) == parameters


@torch.no_grad()
def test_a_fresh_network_outputs_exactly_zero_and_sees_no_text():
    torch.manual_seed(0)
    dit = OpenSoraDiT(**TINY)
    assert not dit(X, T, TEXT).any()
    torch.nn.init.normal_(dit.proj_out.weight)
    assert_close(dit(X, T, TEXT), dit(X, T, 2 * TEXT))


def test_every_parameter_moves_the_output_but_the_bias_of_the_text_s_keys():
    dit = awake(OpenSoraDiT, **TINY)
    dit(X, T, TEXT).square().sum().backward()
    gradients = {name: p.grad.abs().max().item() for name, p in dit.named_parameters()}
    still = {name for name, largest in gradients.items() if largest < 1e-3}
    assert still == {f"transformer_blocks.{i}.attn2.to_k.bias" for i in range(4)}


# -------------------------------------------------------------------------------------------------- sparse attention


def _parts(tokens, parts, run):
    """The tokens of each part."""
    return scattered(torch.arange(tokens).view(1, 1, tokens, 1), parts, run)[:, 0, :, 0].tolist()


def test_parts_are_the_published_ones():
    assert _parts(16, 2, 1) == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    assert _parts(16, 2, 2) == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert _parts(18, 3, 3)[0] == [0, 1, 2, 9, 10, 11]
    assert [len(part) for part in _parts(48, 4, 4)] == [12] * 4


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_two_blocks_connect_every_pair_at_the_published_distance(k):
    tokens = 2 * k * k
    x = torch.arange(2.0 * 3 * tokens * 5).view(2, 3, tokens, 5)
    for run in (1, k):
        assert torch.equal(gathered(scattered(x, k, run), k, run), x)
    single, group = (torch.zeros(tokens, tokens) for _ in range(2))
    for found, run in ((single, 1), (group, k)):
        for part in _parts(tokens, k, run):
            for a, b in itertools.product(part, part):
                found[a, b] = 1.0
    assert (single @ group > 0).all() and (group @ single > 0).all()
    distance = (2 - torch.maximum(single, group)).fill_diagonal_(0.0)  # 1 where some block connects them
    assert distance.mean().item() == pytest.approx(2 - 2 / k + 1 / k**2 - 1 / tokens, rel=1e-6)


@torch.no_grad()
def test_a_sparse_network_of_ratio_one_is_the_dense_one_and_of_more_is_not():
    networks = {k: awake(OpenSoraDiT, **(TINY | {"sparse_n": k})) for k in (1, 2)}
    off = awake(OpenSoraDiT, **TINY, sparse1d=False)
    dense = networks[1](X, T, TEXT)
    assert torch.equal(off(X, T, TEXT), dense)
    assert (networks[2](X, T, TEXT) - dense).abs().max() > 1e-3
    assert torch.equal(awake(OpenSoraDiT, **TINY, sparse_blocks=(4, 4))(X, T, TEXT), dense)


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("sparse_n", [1, 2, 4])
@torch.no_grad()
def test_what_is_masked_is_not_seen(sparse_n):
    dit = awake(OpenSoraDiT, **(TINY | {"sparse_n": sparse_n}))
    latent_mask, text_mask = torch.ones(2, 3, 4, 6), torch.ones(2, 7)
    latent_mask[1, :, :, 4:] = 0
    text_mask[1, 3:] = 0
    noisy, other = X.clone(), TEXT.clone()
    noisy[1, :, :, :, 4:] = 5.0
    other[1, 3:] = 5.0
    seen, same = (dit(x, T, text, text_mask, latent_mask)[1, ..., :4] for x, text in ((X, TEXT), (noisy, other)))
    assert_close(seen, same, rtol=0.0, atol=1e-5)
    assert (dit(noisy, T, other)[1, ..., :4] - seen).abs().max() > 1e-2


@torch.no_grad()
def test_rows_of_zeros_in_a_text_are_padding():
    dit = awake(OpenSoraDiT, **TINY)
    short = TEXT[:, :4]
    longer = torch.cat([short, torch.zeros(2, 5, 24)], dim=1)
    assert_close(dit(X, T, longer), dit(X, T, short), rtol=0.0, atol=1e-5)
    assert dit(X, T, torch.zeros(2, 3, 24)).isfinite().all()


def test_gradients_are_finite_where_whole_parts_are_padding():
    dit = awake(OpenSoraDiT, **(TINY | {"sparse_n": 4}))
    x = noise(1, 4, 1, 2, 4).requires_grad_()  # 2 tokens, filled up to 16
    dit(x, T[:1], TEXT[:1]).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- in training's hands


def test_recomputed_blocks_change_nothing():
    dit = awake(OpenSoraDiT, **TINY)
    plain = torch.autograd.grad(dit(X, T, TEXT).square().sum(), list(dit.blocks()[2].parameters()))
    for block in dit.blocks():
        forward = block.forward
        block.forward = lambda *given, forward=forward: checkpoint(forward, *given, use_reentrant=False)
    again = torch.autograd.grad(dit(X, T, TEXT).square().sum(), list(dit.blocks()[2].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@torch.no_grad()
def test_positions_keep_their_precision_in_half():
    """Far along an axis an angle in bfloat16 would be off by 0.1 rad; the network's error stays that of its sums."""
    dit = awake(OpenSoraDiT, **TINY)
    x = noise(1, 4, 40, 2, 2)
    whole, half = dit(x, T[:1], TEXT[:1]), dit.bfloat16()(x.bfloat16(), T[:1], TEXT[:1].bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - whole).norm() < 0.03 * whole.norm()


V = Objective(prediction_type="v_prediction", zero_terminal_snr=True, snr_gamma=5.0, timestep_strata=2)
FLOW = Objective(prediction_type="flow", flow_density="logit_normal", flow_shift=3.0)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [(V, EulerAncestral(num_inference_steps=3, guidance_scale=7.5)), (FLOW, FlowMatchEuler(num_inference_steps=3))],
)
def test_a_diffusion_system_trains_it_on_captions_and_samples(tmp_path, objective, sampler):
    system = Diffusion(
        denoiser=Slot(**{("context_dim" if n == "caption_channels" else n): v for n, v in TINY.items()}).but(
            in_channels=3, out_channels=3
        ),
        conditions=(tiny_text(dropout=0.5),),
        objective=objective,
    ).build()
    system.text.load(str(write_text(tmp_path)))
    assert list(system.trained) == ["transformer"] and len(system.blocks()) == 4
    assert system.multiples() == (1, 2, 2)
    batch = {"pixel_values": noise(2, 3, 3, 4, 4), "caption": ["a disc", "a ring"]}
    loss, _ = system.loss(batch, Draw.training(0, 0, [0, 1], 2))
    loss.backward()
    assert all(p.grad is not None for p in system.trained.parameters())
    assert system.evaluate(batch, Draw.fixed("evaluate", ["a", "b"], [0, 1], 2))["loss"].shape == (2,)
    clips = system.sample(["a disc"], (3, 4, 6), sampler, Draw.fixed("sample", [0], [0], 1))
    assert clips.shape == (1, 3, 3, 4, 6) and clips.isfinite().all()
    system.export(tmp_path / "export", {"transformer": system.denoiser.state_dict()})
    assert OpenSoraDiT.from_pretrained(tmp_path / "export" / "transformer").config.sparse_n == TINY["sparse_n"]
    assert (tmp_path / "export" / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"attention_head_dim": 32}, "multiple of 6"), ({"sparse_n": 0}, "which is dense"), ({"num_layers": 0}, "at least 1"),
     ({"sparse_blocks": (3, 2)}, "two counts of blocks"), ({"interpolation_scale_h": 0.0}, "above 0"), ({"dropout": 1.0}, r"in \[0, 1\)")],
)  # fmt: skip
def test_sizes_that_cannot_be_built_are_refused(wrong, why):
    with pytest.raises(UserError, match=rf"OpenSoraDiT\.{next(iter(wrong))} = .*{why}"):
        Slot(**wrong)


def test_latents_and_texts_that_do_not_fit_are_refused():
    dit = OpenSoraDiT(**TINY)
    with pytest.raises(UserError, match="latents of 5 x 6: height and width must be multiples of 2"):
        dit(noise(2, 4, 1, 5, 6), T, TEXT)
    with pytest.raises(UserError, match=r"encoder_hidden_states \(2, 7, 12\): expected \(2, N, 24\)"):
        dit(X, T, TEXT[..., :12])
