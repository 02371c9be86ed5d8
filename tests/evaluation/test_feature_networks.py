"""Networks that published scores use, from local files that the tests make: real layouts, random weights."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessor

from core.errors import UserError
from core.evaluation.clip_score import CLIPScore
from core.evaluation.i3d import I3D, Network, preprocess
from core.evaluation.inception import Inception, PooledApart
from core.evaluation.statistics import read_statistics, write_statistics
from core.metrics import frechet_distance, frechet_of_moments, kernel_distance, moments
from tests.evaluation.judges import torchvision_net, write_clip, write_i3d


def frames(n=2, side=48):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ------------------------------------------------------------------------------------------------------------ Inception


@pytest.fixture(scope="module", name="torchvision_net")
def _torchvision_net():
    return torchvision_net()


def test_torchvision_s_file_gives_the_2048_numbers_before_its_classes(torchvision_net, tmp_path):
    torch.save(torchvision_net.state_dict(), tmp_path / "inception_v3.pth")
    net = Inception(tmp_path / "inception_v3.pth")
    with torch.no_grad():
        found = net(frames())
        sized = functional.interpolate(frames(), (299, 299), mode="bilinear", align_corners=False)
        assert found.shape == (2, 2048)
        torch.testing.assert_close(torchvision_net.fc(found), torchvision_net(sized))


def test_tensorflow_s_file_of_1008_classes_pools_without_the_padding(torchvision_net, tmp_path):
    weights = {k: v for k, v in torchvision_net.state_dict().items() if not k.startswith("AuxLogits.")}
    weights |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(weights, tmp_path / "pt_inception.pth")
    net = Inception(tmp_path / "pt_inception.pth").net
    apart = {name: m.largest for name, m in net.named_children() if isinstance(m, PooledApart)}
    assert len(apart) == 9 and [name for name, largest in apart.items() if largest] == ["Mixed_7c"]
    x = torch.rand(1, 192, 5, 5)
    ones = functional.avg_pool2d(torch.ones(1, 1, 5, 5), 3, 1, 1)  # the share of each window that is no padding
    with torch.no_grad():
        pooled = torchvision_net.Mixed_5b.branch_pool(functional.avg_pool2d(x, 3, 1, 1) / ones)
        torch.testing.assert_close(net.Mixed_5b(x)[:, -32:], pooled)
        torch.testing.assert_close(net.Mixed_5b(x)[:, :-32], torchvision_net.Mixed_5b(x)[:, :-32])


def test_a_program_is_refused_and_so_is_another_network(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "i3d.pt"))
    with pytest.raises(UserError, match="refused, this is TorchScript, which is code"):
        I3D(tmp_path / "i3d.pt")
    torch.save({"fc.bias": torch.zeros(1000), "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"it lacks \d+ tensors of Inception3"):
        Inception(tmp_path / "other.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    for build, what in ((Inception, "no Inception-v3"), (I3D, "no I3D")):
        with pytest.raises(UserError, match=what):
            build(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------------------------ I3D


def test_the_sheet_s_ramp_is_prepared_as_published():
    ramp = torch.arange(2 * 4 * 4 * 3).remainder(256).reshape(1, 2, 4, 4, 3).permute(0, 4, 1, 2, 3)
    found = preprocess(ramp / 127.5 - 1)
    assert found.shape == (1, 3, 2, 224, 224)
    measured = [found.min().item(), found.max().item(), found.mean().item()]
    assert measured == pytest.approx([-1.0, -0.254902, -0.627451], abs=1e-5)


def test_a_clip_has_400_numbers_and_the_published_size(tmp_path):
    net = Network().eval()
    net.load_state_dict(torch.load(write_i3d(tmp_path / "rgb.pt"), weights_only=True))
    assert sum(p.numel() for p in net.parameters()) == 12_697_264
    clip = frames(9, 32).transpose(0, 1)[None]  # (1, 3, 9, 32, 32)
    with torch.no_grad():
        found = I3D(tmp_path / "rgb.pt")(clip)
        assert found.shape == (1, 400)
        torch.testing.assert_close(found, net(preprocess(clip)))


# ----------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_the_score_is_a_hundred_times_the_cosine_and_follows_the_caption(clip_folder):
    score, captions = CLIPScore(clip_folder), ["a red cloud", "a blue cloud drifts"]
    clips = frames(2, 40)[:, :, None]
    with torch.no_grad():
        found = score(clips, captions)
        model, words = score.model, score.tokenizer(captions, padding=True, return_tensors="pt")
        out = model(pixel_values=score._pixels(clips[:, :, 0]), **words)
        expected = 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # padding does not count
        assert not torch.allclose(found, score(clips, captions[::-1]), atol=1e-3)
        still = clips.expand(-1, -1, 3, -1, -1)
        torch.testing.assert_close(score(still, captions), found, atol=1e-3, rtol=0)


def test_pictures_are_prepared_as_transformers_prepares_them(clip_folder):
    score = CLIPScore(clip_folder)
    rows = np.linspace(0, 255, 64)[:, None, None] * np.ones((1, 96, 3)) * [1.0, 0.6, 0.3]
    picture = rows.astype(np.uint8)
    theirs = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(
        Image.fromarray(picture), return_tensors="pt"
    )["pixel_values"]
    ours = score._pixels(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.03


def test_a_folder_that_is_no_whole_clip_is_refused(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "no-words")
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / "no-words" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="and a tokenizer"):
        CLIPScore(tmp_path / "no-words")
    shutil.copytree(clip_folder, tmp_path / "no-weights")
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="--clip"):
        CLIPScore(tmp_path / "no-weights")


# ------------------------------------------------------------------------------------------------------------- formulas


def test_distances_from_moments_are_those_of_scipy_and_scikit_learn():
    from scipy.linalg import sqrtm
    from sklearn.metrics.pairwise import polynomial_kernel

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1100, 6)), rng.normal(0.3, 1.4, size=(700, 6))
    (m1, s1), (m2, s2) = moments(a), moments(b)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_of_moments(m1, s1, m2, s2) == pytest.approx(expected)
    assert frechet_distance(a, b) == pytest.approx(expected)
    kernels = [polynomial_kernel(x, y, degree=3, gamma=1 / 6, coef0=1) for x, y in ((a, a), (b, b), (a, b))]
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernels[:2]]
    assert kernel_distance(a, b) == pytest.approx(sum(own) - 2 * kernels[2].mean())


def test_statistics_are_read_as_written_and_anything_else_is_refused(tmp_path):
    file = tmp_path / "coco.npz"
    mu, sigma = moments(np.random.default_rng(0).normal(size=(9, 4)))
    write_statistics(file, mu, sigma)
    assert all(np.array_equal(x, y) for x, y in zip(read_statistics(file, 4), (mu, sigma), strict=True))
    with pytest.raises(UserError, match="but the features here have 2048"):
        read_statistics(file, 2048)
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=sigma)
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("pickled", "text", "nowhere", "nan"):
        with pytest.raises(UserError, match=f"--statistics .*{name}.npz"):
            read_statistics(tmp_path / f"{name}.npz", 4)
