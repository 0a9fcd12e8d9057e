"""The built-in set: the same pixels everywhere, ten classes that can be told apart."""

import zlib

import numpy as np
import pytest

from improved_diffusion.data.builtin_images import CLASS_NAMES, builtin_set, draw_builtin


def test_the_standard_set():
    images, labels = builtin_set(32)
    assert images.shape == (10_000, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [1000] * len(CLASS_NAMES)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_pixels_are_the_same_on_every_machine():
    images, _ = draw_builtin(200)
    assert zlib.crc32(images.tobytes()) == 0x545C7848


def test_an_image_depends_on_its_index_and_the_seed_only():
    many, _ = draw_builtin(700)
    few, _ = draw_builtin(13)
    assert np.array_equal(many[:13], few)
    assert not np.array_equal(draw_builtin(13, seed=1)[0], few)


@pytest.mark.parametrize("image_size", [8, 33, 64])
def test_other_sizes_show_the_same_pictures(image_size):
    images, labels = draw_builtin(10, image_size)
    assert images.shape == (10, image_size, image_size, 3)
    assert labels.tolist() == list(range(10))
    # A picture's mean colour does not depend on how finely it is drawn.
    difference = images.mean((1, 2)) - draw_builtin(10, 128)[0].mean((1, 2))
    assert np.abs(difference).max() < 6


def test_shapes_are_antialiased_on_a_plain_background():
    images, _ = draw_builtin(100)
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[:, :1]).all()
    # The square is a large plain area, with a thin seam of mixed colours around it.
    colours, counts = np.unique(images[6].reshape(-1, 3), axis=0, return_counts=True)
    assert 2 < len(colours) < 12
    assert np.sort(counts)[-2:].sum() > 0.85 * 32 * 32


def test_classes_can_be_told_apart():
    """Nearest class mean on the shape's mask alone, whatever the colours: far above the chance of 10%."""
    images, labels = draw_builtin(1000)
    background = images[:, :1, :1].astype(int)
    masks = (np.abs(images - background).sum(3) > 60).reshape(len(images), -1).astype(float)
    means = np.stack([masks[:500][labels[:500] == label].mean(0) for label in range(10)])
    distances = ((masks[500:, None] - means) ** 2).sum(2)
    assert (distances.argmin(1) == labels[500:]).mean() > 0.8
