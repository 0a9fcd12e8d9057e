"""Power-function averages of the weights, and how averages of other lengths are reconstructed from them.

After t updates, such an average is the mean of the weights after each update k = 1 .. t, with weights (the profile)
proportional to k^gamma. Its length sigma_rel is the standard deviation of the profile divided by t. It determines
gamma. During training the average is computed as a moving average whose decay grows with t.

Source: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), arXiv
2312.02696, section 3 and appendix C.
"""

from collections.abc import Sequence

import numpy as np
import torch as th

from improved_diffusion.config import LONGEST, SHORTEST, power_lengths
from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import Checkpoint

SMALLEST_EIGENVALUE = 1e-11  # relative to the largest; smaller ones amplify the rounding of the weights


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma of the profile of length `sigma_rel` (Karras et al. 2023, eq. 126 and algorithm 2)."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots[roots.imag == 0].real.max())


def sigma_rel_of(gamma: float) -> float:
    """The length of the profile with exponent `gamma` (Karras et al. 2023, eq. 123)."""
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def decay(sigma_rel: float, step: int) -> float:
    """The decay of the average in update `step` = 1, 2, ... (Karras et al. 2023, eq. 2 and 127)."""
    return (1 - 1 / step) ** (gamma_of(sigma_rel) + 1)


def profile(sigma_rel: float, step: int) -> np.ndarray:
    """The share of the weights after each of the updates 1 .. `step` in the average: float64 [step], sum 1."""
    return np.diff((np.arange(step + 1) / step) ** (gamma_of(sigma_rel) + 1))


def parse_lengths(text: str) -> list[str]:
    """The lengths in a comma-separated list, as texts for file names; none in an empty text.

    :raises ValueError: a length is not a number from 0.01 to 0.28, or stands there twice.
    """
    try:
        return power_lengths(text)
    except ValueError as error:
        raise ValueError(f"ema_lengths {text}: {error}") from None


def combine(kept: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> tuple[np.ndarray, float]:
    """The linear combination of averages that is closest to the average of length `sigma_rel` at `step`.

    Closest means the least squares of the profiles (Karras et al. 2023, algorithm 3). In addition, the factors are
    constrained to sum 1. Otherwise a combination of few averages would scale the weights down.

    :param kept: the length and the step of each average.
    :return: the factor of each average, float64 [len(kept)], and the distance between the combined profile and the
        wanted one, divided by the norm of the wanted one.
    """
    gammas = np.array([gamma_of(length) for length, _ in kept] + [gamma_of(sigma_rel)])
    ends = np.array([end for _, end in kept] + [step], dtype=np.float64)
    # Inner products of the profiles (gamma + 1) / t^(gamma + 1) k^gamma, k from 0 to t, each scaled to norm 1.
    first = np.minimum(ends[:, None], ends)
    products = (first / ends[:, None]) ** (gammas[:, None] + 0.5) * (first / ends) ** (gammas + 0.5)
    products *= np.sqrt((2 * gammas[:, None] + 1) * (2 * gammas + 1)) / (gammas[:, None] + gammas + 1)
    norms = (gammas + 1) / np.sqrt((2 * gammas + 1) * ends)
    values, vectors = np.linalg.eigh(products[:-1, :-1])
    used = values > SMALLEST_EIGENVALUE * values.max()
    inverse = (vectors[:, used] / values[used]) @ vectors[:, used].T
    scale = norms[-1] / norms[:-1]
    factors = inverse @ products[:-1, -1]
    factors += inverse @ scale * (1 - scale @ factors) / (scale @ inverse @ scale)
    rest = 1 - 2 * factors @ products[:-1, -1] + factors @ products[:-1, :-1] @ factors
    return factors * scale, float(np.sqrt(max(rest, 0.0)))


def with_averages(folder: str) -> list[Checkpoint]:
    """The checkpoints in `folder` that hold power-function averages, by ascending step.

    Of checkpoints that `checkpoint.rotate` has deleted, only these averages are left.

    :raises DamagedCheckpoint: a file is missing or is not what was written.
    """
    found = {step: checkpoint.read_averages(folder, step) for step in checkpoint.averages_steps(folder)}
    found |= {step: checkpoint.read(folder, step) for step in checkpoint.steps(folder)}
    return [found[step] for step in sorted(found) if found[step].power_lengths]


def reconstruct(
    checkpoints: Sequence[Checkpoint], sigma_rel: float, step: int | None = None
) -> tuple[dict[str, th.Tensor], float]:
    """The average of length `sigma_rel` after `step` updates, reconstructed from the averages in checkpoints.

    :param checkpoints: of one run, in any order, as `with_averages` gives them; those after `step` are ignored.
    :param step: by default the step of the last checkpoint.
    :return: a state dict in float32, and the relative distance of its profile from the wanted one (see `combine`).
        0.1 is small.
    :raises ValueError: `sigma_rel` is out of range, or no checkpoint holds an average.
    :raises DamagedCheckpoint: a file of an average is damaged.
    """
    if not SHORTEST <= sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel {sigma_rel}: expected a number from {SHORTEST} to {LONGEST}")
    step = max((source.step for source in checkpoints), default=0) if step is None else step
    kept = [
        (source, length)
        for source in checkpoints
        if 0 < source.step <= step
        for length in source.power_lengths
    ]
    if not kept:
        raise ValueError(
            f"sigma_rel {sigma_rel}: no checkpoint up to step {step} holds power-function averages; a run keeps "
            "them with ema_lengths, such as 0.05,0.1, and a published model has none"
        )
    factors, distance = combine([(float(length), source.step) for source, length in kept], sigma_rel, step)
    total: dict[str, th.Tensor] = {}
    for factor, (source, length) in zip(factors.tolist(), kept):
        for name, tensor in source.load(checkpoint.power_kind(length)).items():
            total[name] = total.get(name, 0) + factor * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}, distance
