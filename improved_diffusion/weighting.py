"""How much each timestep counts: in what shares timesteps are drawn, and what weight an error there has.

The noise of a timestep is sigma = sqrt((1 - alpha_bar) / alpha_bar), relative to an undiminished image, and its
signal-to-noise ratio is 1 / sigma^2. Weights are those of the squared error of x_start, whatever a model predicts.

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
    """The share of each timestep [T], float64, when ln sigma is drawn from N(`mean`, `std`^2), now and then uniformly.

    A timestep stands for the values of ln sigma that are nearest to its own; what lies beyond the first and the
    last is left out.

    :param sigma: of each timestep, rising, [T].
    :param uniform_share: the share of draws for which all timesteps are alike.
    :raises ValueError: a number is impossible, or the normal distribution misses all timesteps.
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"mean {mean}, std {std}: expected numbers, the second one above 0")
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
    """The signal-to-noise ratio, which gives the plain error of eps, but at most `gamma` (Hang et al. 2023, eq. 7)."""
    return np.minimum(sigma**-2, gamma)


def edm(sigma: np.ndarray, sigma_data: float, shares: np.ndarray) -> np.ndarray:
    """EDM's weight lambda(sigma) (Karras et al. 2022, table 1), times how often it looks at each timestep: T `shares`.

    When timesteps are drawn in the same `shares` and the loss divided by T times these, as a schedule sampler does,
    what is left is the plain error of EDM's F.
    """
    return (sigma**-2 + sigma_data**-2) * len(shares) * shares
