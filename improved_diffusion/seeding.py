"""Random numbers as a function of a seed, a purpose and indices, so that nothing has to be stored to resume."""

from enum import IntEnum

import numpy as np
import torch as th


class Purpose(IntEnum):
    """What a random stream is for; streams of different purposes never overlap."""

    TIMESTEPS = 1
    NOISE = 2
    DROPOUT = 3
    SAMPLE = 4
    CLASS_DROPOUT = 5


def generator(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments.

    :param indices: for example the step or the image's number; non-negative.
    """
    # SeedSequence takes non-negative words only; a negative seed is told apart from its absolute value.
    words = (abs(seed), int(seed < 0), int(purpose), *indices)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> th.Tensor:
    """Standard normal numbers drawn from `rng`, float32."""
    return th.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def integer(rng: np.random.Generator) -> int:
    """A uniform integer in [0, 2^62) drawn from `rng`, to seed another generator."""
    return int(rng.integers(2**62))
