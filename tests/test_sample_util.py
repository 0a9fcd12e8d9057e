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
    draw,
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
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255]


def test_guidance_extrapolates_from_the_prediction_without_a_class():
    def model(x, t, y):
        prediction = y.float()[:, None, None, None] * th.ones_like(x) + x
        return th.cat([prediction, 10 * prediction], dim=1)

    x, t, y = th.zeros(2, 3, 4, 4), th.zeros(2), th.tensor([1, 2])
    guided = guide(model, 3.0, null_label=5)(x, t, y)
    assert guided[:, :3, 0, 0].tolist() == [[5 + 3 * (1 - 5)] * 3, [5 + 3 * (2 - 5)] * 3]
    assert guided[:, 3:, 0, 0].tolist() == [[10.0] * 3, [20.0] * 3]  # the variance is the class's own
    assert th.equal(guide(model, 1.0, null_label=5)(x, t, y), model(x, t, y))


def test_class_labels():
    names = ["bird", "cat", "dog"]
    assert parse_class_labels("", 3, names) == [0, 1, 2]
    assert parse_class_labels("dog, 0,cat", 3, names) == [2, 0, 1]
    for text in ("fox", "3", "-1", "cat,,dog"):
        with pytest.raises(ValueError, match="--class_label.*bird, cat, dog"):
            parse_class_labels(text, 3, names)
    with pytest.raises(ValueError, match="0 to 2"):
        parse_class_labels("cat", 3, [])
