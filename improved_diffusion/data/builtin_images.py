"""The built-in set: pictures of ten coloured shapes that the package draws itself, the same on every machine.

Every shape is a signed distance function: negative inside, zero on the outline, positive outside. A pixel's
coverage by the shape is its distance to the outline in pixels, clipped to one pixel's width, which is what
antialiases the edges. Only operations that IEEE 754 rounds exactly are used (+ - * / sqrt, comparisons), and
only raw random words, so that the pictures depend on no library's version and no processor.
"""

import numpy as np

BUILTIN_COUNT = 10_000
DRAWS_PER_IMAGE = 8
CHUNK = 500  # images drawn at a time: bounds the float64 workspace, changes no pixel

SQRT_HALF = 0.7071067811865476
# Outward unit normals of the five lines of a star that stands on two points: a point of it lies along each.
STAR_NORMALS = (
    (0.0, 1.0),
    (0.9510565162951535, 0.3090169943749474),
    (0.5877852522924731, -0.8090169943749475),
    (-0.5877852522924731, -0.8090169943749475),
    (-0.9510565162951535, 0.3090169943749474),
)
TRIANGLE_NORMALS = ((0.0, -1.0), (0.8660254037844386, 0.5), (-0.8660254037844386, 0.5))


def _length(x, y):
    return np.sqrt(x * x + y * y)


def _circle(x, y):
    return _length(x, y) - 0.9


def _crescent(x, y):
    return np.maximum(_length(x, y) - 1.0, 0.8 - _length(x - 0.45, y))


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1.0, y - 0.3), np.maximum(x - 0.3, y - 1.0))


def _diamond(x, y):
    # The half-plane |x| / 0.75 + |y| / 1.1 <= 1, divided by the length of its gradient.
    gradient = np.sqrt(1 / 0.75**2 + 1 / 1.1**2)
    return (np.abs(x) / 0.75 + np.abs(y) / 1.1 - 1.0) / gradient


def _heart(x, y):
    # A square standing on its corner, with a half disc on each of its upper sides.
    x, y, side = np.abs(x), y + 0.1, 0.8
    square = (x + np.abs(y) - side) * SQRT_HALF
    disc = _length(x - side / 2, y - side / 2) - side * SQRT_HALF
    return np.minimum(square, disc)


def _ring(x, y):
    return np.abs(_length(x, y) - 0.72) - 0.25


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _star(x, y):
    # The centre lies behind all five lines, a point of the star behind four: the second largest decides.
    distances = np.stack([x * a + y * b for a, b in STAR_NORMALS]) - 0.34
    return np.sort(distances, axis=0)[-2]


def _stripes(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(x - 0.9, np.minimum(y - 0.18, np.abs(y - 0.72) - 0.18))


def _triangle(x, y):
    return np.max(np.stack([x * a + (y + 0.2) * b for a, b in TRIANGLE_NORMALS]), axis=0) - 0.58


SHAPES = {
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "stripes": _stripes,
    "triangle": _triangle,
}
CLASS_NAMES = list(SHAPES)


def builtin_set(image_size: int | tuple[int, int] = 32) -> tuple[np.ndarray, np.ndarray]:
    """The standard built-in set: 10,000 images, 1,000 of each class (`draw_builtin` with seed 0)."""
    return draw_builtin(BUILTIN_COUNT, image_size)


def draw_builtin(
    count: int, image_size: int | tuple[int, int] = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images, each of one coloured shape near the centre of a pale background.

    Image i depends on `seed`, i and the size only: a smaller count gives the first images of a larger one.

    :param image_size: side S in pixels, or (height, width); shape and position scale with it.
    :return: images, uint8 [N, S, S, 3] (RGB), and labels, int64 [N]: indices into `CLASS_NAMES`, which take
        turns.
    """
    labels = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
    words = np.random.Philox(key=seed).random_raw(count * DRAWS_PER_IMAGE)
    uniform = ((words >> 11) * 2.0**-53).reshape(count, DRAWS_PER_IMAGE)  # in [0, 1)
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = np.empty((count, *sides, 3), dtype=np.uint8)
    for label, distance in enumerate(SHAPES.values()):
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            images[chunk] = _draw(distance, uniform[chunk], *sides)
    return images, labels


def _draw(distance, uniform: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images [n, height, width, 3] of one shape, from the random numbers [n, DRAWS_PER_IMAGE] in [0, 1)."""
    columns = uniform.T[:, :, None, None]  # each [n, 1, 1], to broadcast over rows and columns of pixels
    radius = min(height, width) * (0.31 + 0.09 * columns[0])
    centre_x = width * (0.5 + 0.12 * (columns[1] - 0.5))
    centre_y = height * (0.5 + 0.12 * (columns[2] - 0.5))
    column, row = np.arange(width) + 0.5, np.arange(height) + 0.5
    x = (column[None, None, :] - centre_x) / radius
    y = (centre_y - row[None, :, None]) / radius  # pixel rows go down, y goes up
    coverage = np.clip(0.5 - distance(x, y) * radius, 0.0, 1.0)[..., None]

    hue = uniform[:, 3]
    shape = _rgb(hue, 0.85 + 0.15 * uniform[:, 4], 0.75 + 0.2 * uniform[:, 5])[:, None, None]
    # A pale background of roughly the opposite hue keeps every shape well visible.
    opposite = (hue + 0.35 + 0.3 * uniform[:, 6]) % 1.0
    background = _rgb(opposite, 0.08 + 0.22 * uniform[:, 7], np.ones_like(hue))[:, None, None]
    return np.floor(255.0 * (background + (shape - background) * coverage) + 0.5).astype(np.uint8)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV colours, each [n] in [0, 1], as RGB [n, 3] in [0, 1]."""
    # Each channel is a trapezoid of the hue around its own third of the colour circle.
    position = (hue[:, None] + np.array([1.0, 2.0 / 3.0, 1.0 / 3.0])) % 1.0 * 6.0
    pure = np.clip(np.abs(position - 3.0) - 1.0, 0.0, 1.0)
    return value[:, None] * (1.0 - saturation[:, None] * (1.0 - pure))
