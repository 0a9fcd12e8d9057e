"""Held-out loss: against the known error of the best denoiser of a Gaussian, and its independence of batches."""

import numpy as np
import pytest
import torch as th

from improved_diffusion.evaluation.heldout import SIGMAS, HeldOut, choose_images, columns, heldout_loss
from improved_diffusion.script_util import create_gaussian_diffusion

DEVIATION = 0.5  # of the "images", Gaussian noise of this standard deviation around zero


@pytest.fixture(scope="module")
def diffusion():
    return create_gaussian_diffusion(steps=1000)


@pytest.fixture(scope="module")
def heldout():
    images = DEVIATION * th.randn(64, 3, 16, 16, generator=th.Generator().manual_seed(0))
    return HeldOut(images, batch_size=4)


def best_eps(diffusion):
    """The noise that the best denoiser of those images sees: E[eps | x] = sigma x / (sigma^2 + alpha^2 s^2)."""
    alpha_bar = th.from_numpy(diffusion.alphas_cumprod).float()

    def model(x, t):
        share = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - share).sqrt() * x / (1 - share + share * DEVIATION**2)

    return model


def test_the_best_denoiser_of_white_noise_has_one_everywhere(diffusion, heldout):
    found = heldout_loss(best_eps(diffusion), diffusion, heldout)
    assert list(found) == columns()
    # 64 / 8 images of 768 numbers each: a standard error of 1.8%
    assert list(found.values()) == pytest.approx([1.0] * 9, abs=0.08)


def test_a_worse_denoiser_has_more(diffusion, heldout):
    best = best_eps(diffusion)
    found = heldout_loss(lambda x, t: best(x, t) + 0.3, diffusion, heldout)
    least = heldout_loss(best, diffusion, heldout)
    assert all(value > least[name] for name, value in found.items())


def test_the_batch_size_does_not_matter(diffusion, heldout):
    model = best_eps(diffusion)
    whole = heldout_loss(model, diffusion, HeldOut(heldout.images, batch_size=64))
    assert heldout_loss(model, diffusion, heldout) == pytest.approx(whole, rel=1e-5)


def test_classes_are_told(diffusion, heldout):
    told = []

    def model(x, t, y):
        told.extend(y.tolist())
        return x

    labels = th.arange(64)
    heldout_loss(model, diffusion, HeldOut(heldout.images, labels))
    assert sorted(told) == list(range(64)) and told[:8] == list(range(0, 64, len(SIGMAS)))


def test_levels_out_of_reach_are_left_out(heldout):
    """The linear schedule of 20 steps begins at a sigma of 0.07."""
    diffusion = create_gaussian_diffusion(steps=20)
    found = heldout_loss(lambda x, t: x, diffusion, heldout)
    assert "heldout_sigma_0.03" not in found and "heldout_sigma_0.2" in found


def test_few_images_are_denoised_at_every_level(diffusion, heldout):
    few = heldout_loss(best_eps(diffusion), diffusion, HeldOut(heldout.images[:3]))
    assert list(few) == columns() and few["heldout_loss"] == pytest.approx(1, abs=0.2)


def test_images_are_spread_over_the_set():
    np.testing.assert_array_equal(choose_images(3), [0, 1, 2])
    assert len(choose_images(10_000)) == 512 and choose_images(10_000)[-1] == 9_999
