"""How much each timestep counts: the probability with which it is drawn, and the weight of its error.

sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise of a timestep relative to the image; the signal-to-noise ratio
is 1 / sigma^2. All weights are those of the squared error of x_start, also where the model predicts something else.

Karras et al. 2022: "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), arXiv 2206.00364.
Hang et al. 2023: "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556.
"""

import math

import numpy as np

SIGMA_MEAN, SIGMA_STD = -1.2, 1.2  # of ln sigma: Karras et al. 2022, table 1
UNIFORM_SHARE = 0.1


def log_normal_shares(
    sigma: np.ndarray,
    mean: float = SIGMA_MEAN,
    std: float = SIGMA_STD,
    uniform_share: float = UNIFORM_SHARE,
) -> np.ndarray:
    """The probability of each timestep, float64 [T], if ln sigma is drawn from N(`mean`, `std`^2).

    A timestep gets the probability of the values of ln sigma that are nearest to its own. The intervals of the first
    and the last timestep are symmetric about their own values; what lies beyond is left out.

    :param sigma: the noise of each timestep, [T], rising.
    :param uniform_share: the share of draws in which all timesteps have the same probability instead.
    :raises ValueError: a number is out of range, or no timestep has such noise.
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"mean {mean}, std {std}: must be finite numbers, and std above 0")
    if not 0 <= uniform_share <= 1:
        raise ValueError(f"uniform_share {uniform_share}: must lie in [0, 1]")
    if len(sigma) == 1:
        return np.ones(1)
    logs = np.log(sigma)
    middles = (logs[1:] + logs[:-1]) / 2
    edges = np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]])
    below = np.array([math.erfc((mean - edge) / (std * math.sqrt(2))) / 2 for edge in edges])
    inside = below[-1] - below[0]
    if not inside > 0:
        raise ValueError(
            f"mean {mean}, std {std}: no timestep has such noise; here ln sigma runs from "
            f"{logs[0]:.1f} to {logs[-1]:.1f}"
        )
    return (1 - uniform_share) * np.diff(below) / inside + uniform_share / len(sigma)


def min_snr(sigma: np.ndarray, gamma: float = 5.0) -> np.ndarray:
    """min(1 / sigma^2, `gamma`), float64 [T] (Hang et al. 2023, eq. 7). 1 / sigma^2 alone gives the error of eps."""
    return np.minimum(sigma**-2, gamma)


def edm(sigma: np.ndarray, sigma_data: float, shares: np.ndarray) -> np.ndarray:
    """EDM's weight lambda(sigma) (Karras et al. 2022, table 1), times T `shares`: float64 [T].

    If a schedule sampler draws timesteps with the same `shares`, it divides the loss by T `shares`. Then the loss is
    the squared error of EDM's F, with the same weight at all timesteps.

    :param sigma: the noise of each timestep, [T]. :param sigma_data: standard deviation of the images.
    :param shares: the probability of each timestep in EDM's training, [T]; see `log_normal_shares`.
    """
    return (sigma**-2 + sigma_data**-2) * len(shares) * shares
