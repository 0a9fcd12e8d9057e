"""Drawing images: independent of the batch, in the right range, laid out in a grid, labelled as asked."""

import numpy as np
import pytest
import torch as th
from conftest import TINY

from improved_diffusion.sample_util import (
    guide,
    image_grid,
    parse_class_labels,
    per_image_noise,
    sample_images,
    to_uint8,
)
from improved_diffusion.script_util import (
    create_model_and_diffusion,
)


def draw(batch_size, num_samples=5, **kwargs):
    _, diffusion = create_model_and_diffusion(**TINY, diffusion_steps=6)

    def model(x, t):  # exact in every batch, unlike a network's convolutions
        return 0.5 * x + 0.001 * t.float()[:, None, None, None]

    settings = {"num_samples": num_samples, "batch_size": batch_size, "image_size": 4, "progress": False}
    return np.concatenate(list(sample_images(model, diffusion, **settings, **kwargs)))


@pytest.mark.parametrize("use_ddim", [False, True])
def test_an_image_depends_on_its_number_and_the_seed_alone(use_ddim):
    whole = draw(5, use_ddim=use_ddim)
    assert whole.shape == (5, 4, 4, 3) and whole.dtype == np.uint8
    assert np.array_equal(whole, draw(2, use_ddim=use_ddim))
    assert np.array_equal(whole[:3], draw(2, num_samples=3, use_ddim=use_ddim))
    assert not np.array_equal(whole, draw(5, use_ddim=use_ddim, seed=1))
    assert not np.array_equal(whole[0], whole[1])


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


def test_grid_shows_every_image_in_order():
    images = np.stack([np.full((8, 8, 3), 20 * i, np.uint8) for i in range(5)])
    grid = np.asarray(image_grid(images))
    assert grid.shape == (2 * 10 * 8 + 16, 3 * 10 * 8 + 16, 3)  # 3 columns, 2 rows, enlarged 8 times
    for i in range(5):
        row, column = divmod(i, 3)
        assert (grid[row * 80 + 50, column * 80 + 50] == 20 * i).all()
    assert np.asarray(image_grid(np.zeros((1, 100, 60, 3), np.uint8))).shape == (104, 64, 3)


def test_grid_gives_each_class_a_row():
    images = np.stack([np.full((64, 64, 3), 20 * i, np.uint8) for i in range(5)])
    grid = np.asarray(image_grid(images, np.array([7, 2, 7, 2, 2])))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    shown = [[int(grid[30 + 66 * row, 30 + 66 * column, 0]) for column in range(3)] for row in range(2)]
    assert shown == [[0, 40, 255], [20, 60, 80]]  # the classes in the order in which they were asked for


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
