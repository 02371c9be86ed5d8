"""Attention: every back end computes the same function, in both directions, and what does not work is said and replaced."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core.attention as attention
from core.attention import attend, attend_frames, relative_logits, relative_rows, resolve_backend, set_attention
from core.errors import UserError
from core.models.lvdm_unet import LVDMUNet


def _tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _by_hand(q, k, v):
    return torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5, -1) @ v


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("keys", [12, 5])
def test_every_back_end_is_softmax_attention_in_output_and_gradient(backend, keys):
    q, k, v = _tensors((2, 3, 12, 8), (2, 3, keys, 8), (2, 3, keys, 8))
    out, expected = attend(q, k, v, backend), _by_hand(q, k, v)
    assert_close(out, expected)
    assert_close(
        torch.autograd.grad(out.square().sum(), (q, k, v)), torch.autograd.grad(expected.square().sum(), (q, k, v))
    )


@pytest.mark.parametrize("limit", [1, 7, 9])
def test_a_batch_beyond_the_kernels_limit_is_split_without_a_trace(monkeypatch, limit):
    q, k, v = _tensors((5, 3, 4, 8), (5, 3, 4, 8), (5, 3, 4, 8))
    seen = []
    monkeypatch.setattr(attention, "MAX_BATCH_HEADS", limit)
    monkeypatch.setitem(attention.BACKENDS, "sdpa", lambda *x: (seen.append(len(x[0])), _by_hand(*x))[1])
    assert_close(attend(q, k, v), _by_hand(q, k, v))
    assert sum(seen) == 5
    assert max(seen) == max(1, limit // 3)


def test_an_unknown_back_end_names_the_nearest():
    with pytest.raises(UserError, match=r"expected one of sdpa, xformers, flash, eager \(did you mean 'xformers'\?\)"):
        set_attention(nn.Identity(), "xformer")


def test_a_back_end_that_does_not_work_here_is_replaced_with_one_warning_that_says_why():
    with pytest.warns(
        UserWarning, match="attention 'xformers' does not work on cpu in torch.float32, sdpa is used: "
    ) as seen:
        assert resolve_backend("xformers", "cpu", torch.float32, 8) == "sdpa"
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


def test_a_back_end_that_fails_only_backwards_is_replaced(monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "flash", lambda q, k, v: _by_hand(q, k, v).detach())
    with pytest.warns(UserWarning, match="RuntimeError"):
        assert resolve_backend("flash", "cpu", torch.float32, 8) == "sdpa"


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash"])
def test_a_back_end_that_works_is_kept_in_silence(backend):
    assert resolve_backend(backend, "cpu", torch.float32, 8) == backend


def test_the_choice_reaches_every_attention_block_and_neither_config_nor_weights():
    unet = LVDMUNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2))
    config, keys = dict(unet.config), set(unet.state_dict())
    set_attention(unet, "eager")
    assert [m.attention_backend for m in unet.modules() if hasattr(m, "attention_backend")] == ["eager"] * 7
    assert (dict(unet.config), set(unet.state_dict())) == (config, keys)


def test_relative_rows_are_clipped_distances_from_query_to_key():
    assert relative_rows(4, 2).tolist() == [[2, 3, 4, 4], [1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 1, 2]]


def _frames_by_hand(q, k, v, keys, values):
    """Equations 3 and 4 of arXiv 1803.02155, one query at a time."""
    outs = []
    for i in range(q.shape[3]):
        logits = ((q[:, :, :, i : i + 1] * k).sum(2) / q.shape[2] ** 0.5) + (
            q[:, :, :, i : i + 1] * keys[i].T[..., None]
        ).sum(2)
        outs.append((logits.softmax(2)[:, :, None] * (v + values[i].T[..., None])).sum(3))
    return torch.stack(outs, dim=3)


@pytest.mark.parametrize("frames", [1, 3, 5, 6, 9])
def test_attention_over_few_and_many_frames_is_the_same_function(frames):
    shape = (2, 3, 4, frames, 5)
    q, k, v, keys, values = given = _tensors(shape, shape, shape, (frames, frames, 4), (frames, frames, 4))
    out = attend_frames(q, k, v, relative_logits(q, keys), values)
    expected = _frames_by_hand(q, k, v, keys, values)
    assert_close(out, expected)
    assert_close(torch.autograd.grad(out.square().sum(), given), torch.autograd.grad(expected.square().sum(), given))


@pytest.mark.parametrize("frames", [3, 7])
def test_attention_over_frames_without_relative_positions_is_attention_at_every_pixel(frames):
    q, k, v = _tensors(*[(2, 3, 4, frames, 5)] * 3)
    tokens = [x.permute(0, 4, 1, 3, 2).flatten(0, 1) for x in (q, k, v)]  # (B P, heads, T, head_dim)
    expected = _by_hand(*tokens).unflatten(0, (2, 5)).permute(0, 2, 4, 3, 1)
    assert_close(attend_frames(q, k, v), expected)


@pytest.mark.parametrize("frames", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_the_softmax_s_accuracy(frames, dtype):
    q, k, v = (x.detach() for x in _tensors(*[(1, 2, 8, frames, 6)] * 3))
    out = attend_frames(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype
    assert_close(out.float(), attend_frames(q, k, v), rtol=0.0, atol=0.03)
