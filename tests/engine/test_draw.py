"""Randomness belongs to a sample's place, not to who draws it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from core.draw import Draw


@given(st.integers(0, 2**31), st.integers(0, 10**9), st.integers(1, 6))
def test_micro_batches_draw_what_the_whole_batch_draws(seed, step, split):
    whole = Draw.training(seed, step, range(6), 6)
    parts = [Draw.training(seed, step, range(i, min(i + split, 6)), 6) for i in range(0, 6, split)]
    for draw in (
        lambda d: d.noise((2, 3)),
        lambda d: d.uniform("t"),
        lambda d: d.stratified(3, "t"),
        lambda d: d.quantiles(),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_steps_places_names_and_seeds_draw_differently():
    base = Draw.training(0, 0, [0], 1).noise((8,))
    others = [Draw.training(1, 0, [0], 1), Draw.training(0, 1, [0], 1), Draw.training(0, 0, [1], 2)]
    assert not any(torch.equal(base, other.noise((8,))) for other in others)
    assert not torch.equal(base, Draw.training(0, 0, [0], 1).noise((8,), "other"))


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    draw = Draw.training(3, 5, range(4000), 4000)
    noise, t = draw.noise((16,)), (draw.stratified(8, "timesteps") * 1000).long()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 15
    assert abs(torch.corrcoef(noise[:, :2].T)[0, 1]) < 0.05


def test_quantiles_cover_the_range_evenly():
    q = Draw.fixed("evaluate", ["a", "b", "c", "d"], range(4), 4).quantiles()
    assert q.tolist() == [0.125, 0.375, 0.625, 0.875]


def test_fixed_noise_belongs_to_the_sample_and_not_to_its_place():
    a = Draw.fixed("evaluate", ["x", "y"], [0, 1], 2).noise((4,))
    b = Draw.fixed("evaluate", ["y", "x"], [0, 1], 2).noise((4,))
    assert torch.equal(a, b.flip(0))
