"""The loss scale of fp16."""

import torch

from core.precision import Scaler, autocast


def test_the_scale_halves_when_a_gradient_overflows_and_grows_after_2000_good_updates():
    scaler = Scaler("fp16")
    assert scaler.scale == 32768.0
    assert scaler.update(finite=False) and scaler.scale == 16384.0
    for _ in range(2000):
        assert not scaler.update(finite=True)
    assert scaler.scale == 32768.0


def test_at_scale_one_a_bad_gradient_is_no_longer_explained_by_the_scale():
    scaler = Scaler("fp16")
    scaler.scale = 1.0
    assert not scaler.update(finite=False) and scaler.scale == 1.0


def test_without_fp16_the_scale_is_one_for_ever():
    for precision in ("fp32", "bf16"):
        scaler = Scaler(precision)
        scaler.update(finite=False)
        scaler.update(finite=True)
        assert scaler.scale == 1.0


def test_autocast_computes_in_what_was_asked_for():
    x = torch.randn(4, 4)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(name, torch.device("cpu")):
            assert (x @ x).dtype == dtype
