"""The 3D autoencoder against the original's numbers."""

import pytest
import torch
from torch.testing import assert_close

from tests.parity.nets import video_vae
from tests.parity.recorded import FAINT, OUTPUT, recorded

VARIANTS = ["main", "other", "faint"]


@pytest.fixture(scope="module")
def case():
    return recorded("lvdm-vae3d")


@pytest.fixture(scope="module")
def vae(case):
    return video_vae(case)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_posterior_is_the_original_s(vae, case, variant):
    posterior = vae.encode(case.inputs[f"{variant}.video"])
    tolerance = FAINT if variant == "faint" else OUTPUT
    assert_close(posterior.mean, case.outputs[f"{variant}.mean"], **tolerance)
    assert_close(posterior.logvar, case.outputs[f"{variant}.logvar"], **tolerance)
    assert_close(posterior.std, case.outputs[f"{variant}.std"], **tolerance)
    # the original sums over axes 1 to 3 only and leaves the width
    assert_close(posterior.kl(), case.outputs[f"{variant}.kl"].sum(1), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_samples_and_latents_are_the_original_s(vae, case, variant):
    posterior = vae.encode(case.inputs[f"{variant}.video"])
    z = posterior.sample(case.inputs[f"{variant}.noise"])
    tolerance = FAINT if variant == "faint" else OUTPUT
    assert_close(z, case.outputs[f"{variant}.sample"], **tolerance)
    assert_close(vae.to_latents(z), case.outputs[f"{variant}.model_latent"], **tolerance)
    assert_close(vae.from_latents(case.outputs[f"{variant}.model_latent"]), case.outputs[f"{variant}.sample"], **OUTPUT)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_decoded_clips_are_the_original_s(vae, case, variant):
    assert_close(vae.decode(case.inputs[f"{variant}.z"]), case.outputs[f"{variant}.decoded"], **FAINT)
    reconstruction, _ = vae(case.inputs[f"{variant}.video"])
    assert_close(reconstruction, case.outputs[f"{variant}.reconstruction_of_mean"], **FAINT)


@torch.no_grad()
def test_a_clip_decoded_alone_is_the_clip_decoded_in_a_batch(vae, case):
    z = case.inputs["main.z"]
    assert_close(torch.cat([vae.decode(one) for one in z.split(1)]), case.outputs["main.decoded"], **FAINT)
