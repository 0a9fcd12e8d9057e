"""Random numbers that depend only on a seed, a purpose and indices, so that a resumed run needs no stored state."""

from enum import IntEnum

import numpy as np
import torch as th


class Purpose(IntEnum):
    """What a random stream is for. Streams of different purposes are independent."""

    TIMESTEPS = 1
    NOISE = 2
    DROPOUT = 3
    SAMPLE = 4
    CLASS_DROPOUT = 5


def generator(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """A random generator that depends only on these arguments.

    :param indices: non-negative numbers, for example the number of the step or of the image.
    """
    # SeedSequence takes non-negative numbers only, so the sign of the seed is a number of its own.
    words = (abs(seed), int(seed < 0), int(purpose), *indices)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> th.Tensor:
    """Standard normal numbers drawn from `rng`, float32."""
    return th.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def integer(rng: np.random.Generator) -> int:
    """A uniform integer in [0, 2^62) drawn from `rng`, to seed another generator."""
    return int(rng.integers(2**62))
