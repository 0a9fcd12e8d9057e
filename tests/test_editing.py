"""SDEdit and RePaint against Gaussians, for which what should come out is known in closed form."""

import math

import numpy as np
import pytest
import torch as th
from diffusions import build

from improved_diffusion.editing import Edit
from improved_diffusion.respace import log_signal_to_noise
from improved_diffusion.sample_util import Plan, Subject, draw, sample_images, to_uint8
from improved_diffusion.samplers import SAMPLERS, path_levels, sample_progressive, space_levels

RANDOM = [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5), ("sde_dpmpp_2m", 1.0)]
IMAGE = (1, 2, 2)  # one channel: four pixels, that depend on each other
ROOT = th.tensor([[0.35, 0, 0, 0], [0.25, 0.25, 0, 0], [-0.2, 0.1, 0.2, 0], [0.3, -0.1, 0.1, 0.15]])
COVARIANCE = (ROOT @ ROOT.T).double()
MEAN = th.tensor([0.2, -0.1, 0.1, 0.0], dtype=th.float64)
KEPT, DRAWN = [0, 1], [2, 3]
MASK = th.tensor([[False, False], [True, True]])


LAMBDA = log_signal_to_noise(build())


def alpha_sigma(timestep):
    lam = np.interp(timestep, np.arange(1000), LAMBDA)
    return 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))


def perfect_model():
    """Predicts the mean of eps given x, for images of N(MEAN, COVARIANCE)."""
    values, vectors = th.linalg.eigh(COVARIANCE)

    def model(x, t):
        alpha, sigma = alpha_sigma(t[0].item())
        along = (x.flatten(1) - alpha * MEAN) @ vectors
        return (sigma * along / (alpha**2 * values + sigma**2) @ vectors.T).view(x.shape)

    return model


def stream(seed=1):
    generator = th.Generator().manual_seed(seed)
    return lambda x: th.randn(x.shape, generator=generator, dtype=th.float64)


def edited(edit, sampler, steps, eta=0.0, spacing="logsnr"):
    """All that is drawn, [N, 4]."""
    diffusion, randn_like = build(), stream()
    *_, last = sample_progressive(
        perfect_model(),
        diffusion,
        randn_like(edit.images),
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=eta,
        clip_denoised=False,
        randn_like=randn_like,
        edit=edit,
    )
    return last["sample"].flatten(1)


def image(*pixels, count=20_000):
    return th.tensor(pixels, dtype=th.float64).view(1, *IMAGE).expand(count, *IMAGE)


# SDEdit


@pytest.mark.parametrize("sampler, eta", [(name, 0.0) for name in SAMPLERS] + [RANDOM[1], RANDOM[3]])
@pytest.mark.parametrize("strength", [0.1, 0.3])
def test_sdedit_has_the_known_mean_and_covariance(sampler, eta, strength):
    start = [0.8, 0.5, -0.6, 0.1]
    alpha, sigma = alpha_sigma(round(strength * 1000) - 1)
    # Of x at the first level, in units of what the model's x has there; both hold in every direction by itself.
    values, vectors = th.linalg.eigh(COVARIANCE)
    spread = alpha**2 * values + sigma**2
    offset = (th.tensor(start, dtype=th.float64) - MEAN) @ vectors
    if sampler == "ddpm" or eta:  # x_0 given x is drawn from the posterior
        mean = values * alpha**2 / spread * offset
        variance = (values * alpha / spread) ** 2 * sigma**2 + values * sigma**2 / spread
    else:  # the flow keeps x's distance from the mean in units of the standard deviation
        mean = (values / spread).sqrt() * alpha * offset
        variance = values * sigma**2 / spread
    drawn = (edited(Edit(image(*start), strength), sampler, 100, eta) - MEAN) @ vectors
    assert th.allclose(drawn.mean(0), mean, atol=0.015)
    assert th.allclose(drawn.std(0), variance.sqrt(), rtol=0.08)
    assert not th.allclose(mean, offset, atol=0.1)  # it is neither the image that it was,
    assert not th.allclose(mean, th.zeros(4).double(), atol=0.1)  # nor one that knows nothing of it


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "logsnr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_the_path_begins_at_the_strength(spacing, steps):
    diffusion = build()
    whole = space_levels(diffusion, steps, spacing)
    for strength in (0.001, 0.02, 0.25, 0.6, 0.999):
        levels = path_levels(diffusion, steps, spacing, Edit(image(0, 0, 0, 0), strength))
        assert levels[0] == min(round(strength * 1000) - 1, whole[0])
        assert (np.diff(levels) < 0).all() and set(levels[1:]) <= set(whole)
        assert len(levels) == 1 or levels[-1] == 0
    assert np.array_equal(path_levels(diffusion, steps, spacing, Edit(image(0, 0, 0, 0), 1.0)), whole)


def test_the_strength_counts_the_timesteps_that_are_left():
    diffusion = build(respacing=[50])
    levels = path_levels(diffusion, 50, "uniform", Edit(image(0, 0, 0, 0), 0.6))
    assert levels.tolist() == list(range(29, -1, -1))
    assert Plan("ddpm", None).count_steps(diffusion, Edit(image(0, 0, 0, 0), 0.6)) == 30


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_all_the_noise_nothing_is_left_of_the_image(sampler):
    one = edited(Edit(image(0.9, 0.9, 0.9, 0.9, count=3), 1.0), sampler, 5)
    other = edited(Edit(image(-0.9, 0.1, 0.5, 0.9, count=3), 1.0), sampler, 5)
    assert th.equal(one, other)


# RePaint


def conditional(kept):
    """Mean and covariance of the pixels DRAWN of N(MEAN, COVARIANCE), given those KEPT."""
    weights = COVARIANCE[DRAWN][:, KEPT] @ th.linalg.inv(COVARIANCE[KEPT][:, KEPT])
    mean = MEAN[DRAWN] + weights @ (th.tensor(kept, dtype=th.float64) - MEAN[KEPT])
    return mean, COVARIANCE[DRAWN][:, DRAWN] - weights @ COVARIANCE[KEPT][:, DRAWN]


@pytest.mark.parametrize("sampler, eta", RANDOM)
def test_repaint_draws_from_the_conditional(sampler, eta):
    mean, covariance = conditional([0.9, 0.4])
    deviation = covariance.diagonal().sqrt()

    def errors(rounds):
        # What lies below the mask must not matter: 5 is far off.
        edit = Edit(image(0.9, 0.4, 5.0, 5.0, count=3000), mask=MASK, rounds=rounds)
        drawn = edited(edit, sampler, 60, eta, "quadratic" if sampler != "sde_dpmpp_2m" else "logsnr")
        assert th.equal(drawn[:, KEPT], edit.images.flatten(1)[:, KEPT])
        found = th.cov(drawn[:, DRAWN].T)
        off = ((drawn[:, DRAWN].mean(0) - mean) / deviation).abs().max()
        return off.item(), ((found - covariance).norm() / covariance.norm()).item()

    off, wrong = errors(12)
    assert off < 0.2 and wrong < 0.25
    # Without resampling, what is drawn knows too little of what is kept (Lugmayr et al. 2022, section 4.2).
    assert errors(1)[0] > 0.7


@pytest.mark.parametrize("sampler, eta", RANDOM)
def test_more_rounds_make_more_steps_and_stay_finite(sampler, eta):
    edit = Edit(image(0.9, 0.4, 0.0, 0.0, count=50), mask=MASK, rounds=20)
    assert edit.steps(20) == 19 * 20 + 1
    assert edited(edit, sampler, 20, eta).abs().max() < 5  # a solver's memory must not reach across new noise


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"ddpm"}))
def test_a_mask_needs_a_sampler_that_adds_noise(sampler):
    with pytest.raises(ValueError, match=f"mask: needs a sampler that adds noise, not {sampler}"):
        edited(Edit(image(0, 0, 0, 0, count=1), mask=MASK), sampler, 5)


def test_strength_and_mask_together():
    # Little noise leaves the part that is drawn anew near what it was.
    near = edited(Edit(image(0.9, 0.4, -0.4, 0.7, count=200), 0.02, MASK, 3), "ddpm", 50)
    assert near[:, DRAWN].mean(0).tolist() == pytest.approx([-0.4, 0.7], abs=0.2)
    assert th.equal(near[:, KEPT], image(0.9, 0.4, 0, 0, count=200).flatten(1)[:, KEPT])


# Drawing


def smooth(x, t):
    return 0.5 * x + 0.001 * t.float()[:, None, None, None]


@pytest.mark.parametrize("plan", [Plan("ddim", 6, eta=1.0), Plan("ddpm", None), Plan("sde_dpmpp_2m", 5)])
def test_the_kept_part_has_the_same_grey_levels(plan):
    pixels = th.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), dtype=np.uint8))
    mask = th.zeros(4, 4, dtype=th.bool)
    mask[1:3] = True
    edit = Edit(pixels.float() / 127.5 - 1, mask=mask, rounds=2)
    subject = Subject(4, seed=5, edit=edit)
    drawn = {}
    for batch_size in (2, 7):
        batches = sample_images(smooth, build(20), plan, subject, num_samples=7, batch_size=batch_size)
        drawn[batch_size] = np.concatenate(list(batches))[:, 0]
    assert np.array_equal(drawn[2], drawn[7])
    originals = pixels.permute(0, 2, 3, 1).numpy()[np.arange(7) % 3]
    keep = ~mask.numpy()
    assert np.array_equal(drawn[7][:, keep], originals[:, keep])
    assert not np.array_equal(drawn[7][:, ~keep], originals[:, ~keep])
    assert not np.array_equal(drawn[7][0], drawn[7][3])  # of the same image, with other noise
    states = list(draw(smooth, build(20), plan, subject, range(2)))
    assert np.array_equal(to_uint8(states[0]), originals[:2])
    assert len(states) == 1 + plan.count_steps(build(20), edit)
