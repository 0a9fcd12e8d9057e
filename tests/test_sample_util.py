"""Drawing images: independent of the batch, in the right range, laid out in a grid, labelled as asked."""

import numpy as np
import pytest
import torch as th
from conftest import TINY

from improved_diffusion.data.class_labels import parse_class_labels
from improved_diffusion.sample_util import (
    DEFAULT_PLAN,
    Plan,
    Subject,
    autoguide,
    draw,
    from_uint8,
    guidance_interval,
    guide,
    interpolate,
    per_image_noise,
    sample_images,
    to_uint8,
)
from improved_diffusion.script_util import create_model_and_diffusion

T = 12
SIX_STEPS = Plan("unipc", 6)


def model(x, t):  # exact in every batch, unlike a network's convolutions
    return 0.5 * x + 0.001 * t.float()[:, None, None, None]


def diffusion():
    return create_model_and_diffusion(**TINY, diffusion_steps=T)[1]


def drawn(batch_size, num_samples=5, plan=SIX_STEPS, seed=0, **options):
    batches = sample_images(
        model,
        diffusion(),
        plan,
        Subject(image_size=4, seed=seed),
        num_samples=num_samples,
        batch_size=batch_size,
        **options,
    )
    return np.concatenate(list(batches))


PLANS = [SIX_STEPS, Plan("ddim", None), Plan("ddim", 4, eta=0.7), Plan("ddpm", None), Plan("ddpm", 5)]


@pytest.mark.parametrize("plan", PLANS)
def test_an_image_depends_on_its_number_and_the_seed_alone(plan):
    whole = drawn(5, plan=plan)
    assert whole.shape == (5, 1, 4, 4, 3) and whole.dtype == np.uint8
    assert np.array_equal(whole, drawn(2, plan=plan))
    assert np.array_equal(whole[:3], drawn(2, num_samples=3, plan=plan))
    assert not np.array_equal(whole, drawn(5, plan=plan, seed=1))
    assert not np.array_equal(whole[0], whole[1])


def test_without_a_number_of_steps_it_is_improved_diffusions_loop():
    for plan, loop in ((Plan("ddpm", None), "p_sample_loop"), (Plan("ddim", None), "ddim_sample_loop")):
        randn_like = per_image_noise(3, range(2))
        noise = randn_like(th.empty(2, 3, 4, 4))
        expected = getattr(diffusion(), loop)(model, noise.shape, noise=noise, randn_like=randn_like)
        *_, x = draw(model, diffusion(), plan, Subject(4, seed=3), range(2))
        assert th.equal(x, expected)
        assert plan.count_steps(diffusion()) == T
    assert DEFAULT_PLAN.count_steps(diffusion()) == 20


def test_frames_lead_from_the_noise_to_the_image():
    subject = Subject(image_size=4)
    states = [to_uint8(x) for x in draw(model, diffusion(), SIX_STEPS, subject, range(3))]
    assert np.array_equal(states[0], to_uint8(per_image_noise(0, range(3))(th.empty(3, 3, 4, 4))))
    assert np.array_equal(np.stack(states, axis=1), drawn(3, num_samples=3, frames=60))
    assert np.array_equal(
        np.stack([states[0], states[3], states[6]], axis=1), drawn(3, num_samples=3, frames=3)
    )
    assert np.array_equal(states[6][:, None], drawn(3, num_samples=3))


def test_latents_labels_and_small_images_go_to_their_image():
    told = []

    def watched(x, t, y, low_res):
        told.append((y.tolist(), low_res[:, 0, 0, 0].tolist()))
        return x

    low_res = th.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    latents = th.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    subject = Subject(4, labels=[7, 8, 9, 7, 8], low_res=low_res, latents=latents)
    states = list(draw(watched, diffusion(), Plan("unipc", 2), subject, range(2, 5)))
    assert th.equal(states[0], latents[2:])
    assert told == [([9, 7, 8], [2.0, 3.0, 4.0])] * 2


def test_interpolation_stays_as_far_from_grey_as_noise_is():
    first, last = per_image_noise(0, range(2))(th.empty(2, 3, 16, 16))
    path = interpolate(first, last, 5)
    assert path.shape == (5, 3, 16, 16) and path.dtype == th.float32
    assert th.allclose(path[0], first, atol=1e-6) and th.allclose(path[-1], last, atol=1e-6)
    assert th.allclose(path.flatten(1).std(dim=1), th.ones(5), atol=0.05)  # a straight line's middle has 0.7
    angles = [th.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(path, path[1:])]
    assert max(angles) - min(angles) < 0.01


def test_noise_streams_go_on():
    noise = per_image_noise(0, [3, 9])
    first, second = noise(th.zeros(2, 3, 2, 2)), noise(th.zeros(2, 3, 2, 2))
    assert not th.equal(first, second)
    assert th.equal(first[1], per_image_noise(0, [9])(th.zeros(1, 3, 2, 2))[0])
    many = per_image_noise(0, range(200))(th.zeros(200, 3, 8, 8))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def test_to_uint8_covers_the_range():
    values = th.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_to_uint8_is_the_nearest_level():
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.tile(levels.reshape(16, 16, 1), (1, 1, 1, 3))
    exact = from_uint8(pixels.reshape(1, 16, 16, 3))
    for error in (-0.49, 0.0, 0.49):
        assert np.array_equal(to_uint8(exact + error / 127.5), pixels)


def test_guidance_extrapolates_from_the_prediction_without_a_class():
    def model(x, t, y):
        prediction = y.float()[:, None, None, None] * th.ones_like(x) + x
        return th.cat([prediction, 10 * prediction], dim=1)

    x, t, y = th.zeros(2, 3, 4, 4), th.zeros(2), th.tensor([1, 2])
    guided = guide(model, 3.0, null_label=5)(x, t, y)
    assert guided[:, :3, 0, 0].tolist() == [[5 + 3 * (1 - 5)] * 3, [5 + 3 * (2 - 5)] * 3]
    assert guided[:, 3:, 0, 0].tolist() == [[10.0] * 3, [20.0] * 3]  # the variance is the class's own
    assert th.equal(guide(model, 1.0, null_label=5)(x, t, y), model(x, t, y))


def noise_at(diffusion, t):
    share = diffusion.alphas_cumprod[t]
    return ((1 - share) / share) ** 0.5


@pytest.mark.parametrize("arguments", [{}, {"timestep_respacing": "7"}, {"rescale_timesteps": False}])
def test_guidance_within_an_interval(arguments):
    diffusion = create_model_and_diffusion(**{**TINY, "diffusion_steps": 100, **arguments})[1]
    images = []

    def model(x, t, y):
        images.append(len(x))
        return y.float()[:, None, None, None] * th.ones_like(x)

    last = diffusion.num_timesteps - 1
    low, high = noise_at(diffusion, 1), noise_at(diffusion, last - 1)
    within = guidance_interval(diffusion, low * 0.999, high * 1.001)
    guided, x, y = guide(model, 3.0, null_label=5, within=within), th.zeros(2, 3, 4, 4), th.tensor([1, 2])
    for t, inside in ((0, False), (1, True), (last // 2, True), (last - 1, True), (last, False)):
        images.clear()
        found = guided(x, diffusion.model_timesteps(th.full((2,), t)), y)[:, 0, 0, 0]
        assert found.tolist() == ([5 + 3 * (1 - 5), 5 + 3 * (2 - 5)] if inside else [1, 2])
        assert images == [4 if inside else 2]  # outside, it costs nothing
    # Half of a batch inside.
    found = guided(x, diffusion.model_timesteps(th.tensor([0, 1])), y)[:, 0, 0, 0]
    assert found.tolist() == [1, 5 + 3 * (2 - 5)]


def test_guidance_interval_between_timesteps():
    diffusion = create_model_and_diffusion(**TINY, diffusion_steps=100)[1]
    sigma = (noise_at(diffusion, 40) * noise_at(diffusion, 41)) ** 0.5  # at 40.5, lambda being linear
    told = diffusion.model_timesteps(th.tensor([40, 41])).double()
    for t, inside in ((told.mean(), True), (told.mean() - 0.2, False), (told.mean() + 0.2, False)):
        assert guidance_interval(diffusion, sigma * 0.9999, sigma * 1.0001)(t.view(1)).item() == inside
    for low, high in ((1, 1), (2, 1), (-1, 1), (float("nan"), 1)):
        with pytest.raises(ValueError, match="interval from .*: expected two numbers"):
            guidance_interval(diffusion, low, high)


def test_autoguidance_extrapolates_from_the_worse_model():
    def better(x, t, y):
        return th.cat([x + y.float()[:, None, None, None], x + 7], dim=1)

    def worse(x, t, y):
        calls.append(len(x))
        return th.cat([x - y.float()[:, None, None, None], x - 7], dim=1)

    calls = []
    x, t, y = th.randn(2, 3, 4, 4), th.tensor([3.0, 3.0]), th.tensor([1, 2])
    found = autoguide(better, worse, 1.5)(x, t, y=y)
    shift = y.float()[:, None, None, None]
    th.testing.assert_close(found[:, :3], x + shift + 0.5 * 2 * shift)
    assert th.equal(found[:, 3:], x + 7)  # the variance is the better model's own
    assert calls == [2]
    outside = autoguide(better, worse, 1.5, within=lambda timesteps: timesteps > 5)(x, t, y=y)
    assert th.equal(outside, better(x, t, y)) and calls == [2]


def test_both_kinds_of_guidance_together():
    """Each prediction, for the class and without, is improved by itself, then guided."""

    def better(x, t, y):
        return th.sin(x + y[:, None, None, None])

    def worse(x, t, y):
        return th.cos(x * (1 + y[:, None, None, None]))

    x, t, y, none = th.randn(2, 3, 4, 4), th.zeros(2), th.tensor([1, 2]), th.tensor([5, 5])
    found = guide(autoguide(better, worse, 1.5), 3.0, null_label=5)(x, t, y)
    given, free = (
        better(x, t, label) + 0.5 * (better(x, t, label) - worse(x, t, label)) for label in (y, none)
    )
    th.testing.assert_close(found, free + 3 * (given - free))


def test_the_spacing_and_eta_that_suit_a_sampler():
    assert DEFAULT_PLAN.spacing == Plan("sde_dpmpp_2m", eta=0.0).spacing == "quadratic"
    for sampler in ("ddpm", "ddim", "dpmpp_2m", "deis", "ipndm"):
        assert Plan(sampler).spacing == "quadratic" and Plan(sampler).eta == 0
    for sampler in ("heun", "dpmpp_3m", "unipc"):
        assert Plan(sampler).spacing == "logsnr" and Plan(sampler).eta == 0
    assert Plan("sde_dpmpp_2m").eta == 1 and Plan("sde_dpmpp_2m").is_random
    assert Plan("ddim", eta=1.0, spacing="karras").spacing == "karras"


def test_class_labels():
    names = ["bird", "cat", "dog"]
    assert parse_class_labels("", 3, names) == [0, 1, 2]
    assert parse_class_labels("dog, 0,cat", 3, names) == [2, 0, 1]
    for text in ("fox", "3", "-1", "cat,,dog"):
        with pytest.raises(ValueError, match="no such class.*bird, cat, dog"):
            parse_class_labels(text, 3, names)
    with pytest.raises(ValueError, match="0 to 2"):
        parse_class_labels("cat", 3, [])
