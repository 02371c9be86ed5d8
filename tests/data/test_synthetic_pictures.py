"""Captioned shapes: what a caption says is in its picture, and still is after the shipped autoencoder."""

import numpy as np
import pytest
import torch

from core.attributes import UNREAD, read, report, scores, words_of
from core.metrics import psnr
from core.slots.metric import COLOURS, PLACES, SHAPES
from core.weights.load import load_component
from data.synthetic_pictures import COMBINATIONS, PHRASES, caption, pictures, render, told
from registry import get


def clips(split="test", count=240, **given):
    """Pictures as clips of one frame, (N, 3, 1, H, W) in [-1, 1], and their captions."""
    captions, drawn = zip(*pictures(split, count, **given), strict=True)
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1, captions


@pytest.fixture(scope="module")
def test_set():
    return clips()


def test_the_same_arguments_give_the_same_pictures_and_another_seed_or_split_none_of_them():
    a, b, other, train = (clips(split, 12, seed=seed)[0] for split, seed in (("t", 1), ("t", 1), ("t", 2), ("u", 1)))
    assert torch.equal(a, b)
    for x in (other, train):
        assert not any(torch.equal(one, picture) for one in x for picture in a)


def test_all_combinations_come_equally_often_in_every_phrase():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == len(COLOURS) * len(SHAPES) * len(PLACES) == 120
    assert [told(i) for i in range(120, 240)] == COMBINATIONS
    said = {caption(seed, told(7)) for seed in range(100)}
    assert len(said) == len(PHRASES)
    for name, known in (("colour", COLOURS), ("shape", SHAPES), ("place", PLACES)):
        assert {words_of([text], name).item() for text in said} == {list(known).index(getattr(told(7), name))}


@pytest.mark.parametrize("size", [32, 64, 256])
def test_the_metric_reads_every_attribute_of_every_combination_at_every_size(size):
    found = scores(*clips(count=120, size=size))
    assert found == {"colour_score": 1.0, "shape_score": 1.0, "place_score": 1.0}


def test_pictures_that_did_not_listen_are_at_chance(test_set):
    found = report(*test_set, *test_set)
    for name, known in (("colour", COLOURS), ("shape", SHAPES), ("place", PLACES)):
        assert found[f"{name}_score"] == found[f"{name}_score_real"] == 1.0
        assert abs(found[f"{name}_score_shuffled"] - 1 / len(known)) < 0.08
        assert found[f"{name}_score_mean_clip"] <= 1 / len(known)


def test_grain_and_dimness_do_not_mislead(test_set):
    pictures, captions = test_set
    noise = 0.08 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert min(scores(pictures * 0.85 + noise - 0.1, captions).values()) > 0.95


def test_a_mirrored_picture_is_elsewhere_with_the_same_colour_and_shape(test_set):
    seen, mirrored = read(test_set[0]), read(test_set[0].flip(-1))
    assert UNREAD not in seen["shape"].tolist()
    assert torch.equal(seen["colour"], mirrored["colour"]) and torch.equal(seen["shape"], mirrored["shape"])
    side = torch.tensor(
        [list(PLACES).index(p.replace("left", "?").replace("right", "left").replace("?", "right")) for p in PLACES]
    )
    assert torch.equal(side[seen["place"]], mirrored["place"])


def test_an_empty_picture_shows_nothing():
    assert all(index.tolist() == [UNREAD] for index in read(torch.full((1, 3, 1, 32, 32), -0.6)).values())


def test_shapes_are_whole_in_the_picture_and_dark_at_its_edge():
    for index in range(120):
        picture = render(index, told(index), 64).astype(int)
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert edge.max() <= 90, told(index)


@torch.no_grad()
def test_the_shipped_autoencoder_of_clouds_keeps_what_captions_say(test_set):
    slot = get("lvdm-text2video-tiny").system.autoencoder
    vae = slot.build()
    load_component(vae, slot.weights, "vae")
    pictures, captions = test_set
    seen = vae.eval().decode(vae.encode(pictures).mean).clamp(-1, 1)
    assert psnr(seen, pictures) > 26
    assert min(scores(seen, captions).values()) >= 0.98
