"""Power-function averages of the weights: kept while training, and any length between made of them afterwards.

The average of length sigma_rel after t updates weighs the weights after update number k in proportion to k^gamma,
up to t: the longer the run, the longer the average. sigma_rel, the width of this profile relative to t, determines
gamma. One that follows the weights, a moving average whose decay grows with t, costs nothing to keep.

Karras et al. 2023: "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), arXiv 2312.02696,
section 3 and appendix C.
"""

from collections.abc import Sequence

import numpy as np
import torch as th

from improved_diffusion.config import LONGEST, SHORTEST, power_lengths
from improved_diffusion.run import checkpoint
from improved_diffusion.run.checkpoint import Checkpoint

SMALLEST_EIGENVALUE = 1e-11  # what is told apart by less is lost in the rounding of the weights


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile whose width is `sigma_rel` (Karras et al. 2023, eq. 126 and algorithm 2)."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots[roots.imag == 0].real.max())


def sigma_rel_of(gamma: float) -> float:
    """The width of the profile k^`gamma`: its standard deviation for t = 1 (Karras et al. 2023, eq. 123)."""
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def decay(sigma_rel: float, step: int) -> float:
    """The decay of the average in update number `step`, from 1 on (Karras et al. 2023, eq. 2 and 127)."""
    return (1 - 1 / step) ** (gamma_of(sigma_rel) + 1)


def profile(sigma_rel: float, step: int) -> np.ndarray:
    """What share the weights after each of the updates 1 .. `step` have in the average: [step], adding up to 1."""
    return np.diff((np.arange(step + 1) / step) ** (gamma_of(sigma_rel) + 1))


def parse_lengths(text: str) -> list[str]:
    """The lengths in a comma-separated list, as they shall stand in file names; none in an empty text.

    :raises ValueError: one is no number from 0.01 to 0.28.
    """
    try:
        return power_lengths(text)
    except ValueError as error:
        raise ValueError(f"ema_lengths {text}: {error}") from None


def combine(kept: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> tuple[np.ndarray, float]:
    """How averages `kept`, each a length and a step, make up the one of length `sigma_rel` at `step`.

    :return: the factor of each, whose profiles then come closest to the one wanted (Karras et al. 2023, algorithm
        3), and how far they are from it: the distance relative to the latter's norm. Unlike there, the factors are
        made to add up to 1, so that few averages do not shrink the weights.
    """
    gammas = np.array([gamma_of(length) for length, _ in kept] + [gamma_of(sigma_rel)])
    ends = np.array([end for _, end in kept] + [step], dtype=np.float64)
    # Inner products of (gamma + 1) / t^(gamma + 1) k^gamma for k from 0 to t, each profile scaled to a norm of 1.
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
    """The average of length `sigma_rel` after `step` updates, made of those that the checkpoints hold.

    :param checkpoints: of one run, in any order; those after `step` are left out.
    :param step: by default that of the last checkpoint.
    :return: a state dict, and how far its profile is from the one wanted (see `combine`): 0.1 is little.
    :raises ValueError: the length is impossible, or no checkpoint holds an average.
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
            f"sigma_rel {sigma_rel}: no checkpoint up to step {step} holds power-function averages; they are kept in a "
            "training with ema_lengths, such as 0.05,0.1"
        )
    factors, distance = combine([(float(length), source.step) for source, length in kept], sigma_rel, step)
    total: dict[str, th.Tensor] = {}
    for factor, (source, length) in zip(factors.tolist(), kept):
        for name, tensor in source.load(checkpoint.power_kind(length)).items():
            total[name] = total.get(name, 0) + factor * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}, distance
