"""Log-likelihoods and KL divergences of Gaussians, elementwise: the terms of the variational bound."""

import math

import torch as th
from torch import Tensor

PIXEL_HALF_WIDTH = 1 / 255  # half the distance between two neighbouring 8-bit values, scaled to [-1, 1]
SMALLEST_PROBABILITY = 1e-12  # keeps the logarithm finite where float32 rounds a probability to 0


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [N, ...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def normal_kl(
    mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float
) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats.

    The arguments are tensors, which broadcast against each other, or numbers. At least one must be a tensor.
    """
    arguments = (mean1, logvar1, mean2, logvar2)
    like = next(argument for argument in arguments if isinstance(argument, Tensor))
    mean1, logvar1, mean2, logvar2 = (
        th.as_tensor(argument, dtype=like.dtype, device=like.device) for argument in arguments
    )
    # In a small divergence, large terms cancel, so its rounding depends on the order of the summands. This order
    # gives the numbers of improved-diffusion.
    variances = -1 + logvar2 - logvar1 + th.exp(logvar1 - logvar2)
    return 0.5 * (variances + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The cumulative distribution function of N(0, 1) at `x`, by its tanh approximation (error below 3e-4).

    Published likelihoods of diffusion models were computed with this approximation. With the exact function, results
    could not be compared with them.
    """
    return 0.5 * (1 + th.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability, in nats, of 8-bit pixels under a Gaussian (Ho et al. 2020, eq. 13).

    The probability of a pixel is that of the interval of width 2/255 around its value. The intervals of the values -1
    and 1 reach to infinity.

    :param x: pixels, 8-bit values scaled to [-1, 1], of any shape.
    :param means: the means of the Gaussian, of x's shape.
    :param log_scales: the logarithms of its standard deviations, of x's shape.
    :return: a tensor of x's shape.
    """
    precision = th.exp(-log_scales)
    below_upper_edge = approx_standard_normal_cdf((x - means + PIXEL_HALF_WIDTH) * precision)
    below_lower_edge = approx_standard_normal_cdf((x - means - PIXEL_HALF_WIDTH) * precision)
    probability = below_upper_edge - below_lower_edge
    probability = th.where(x < -0.999, below_upper_edge, probability)
    probability = th.where(x > 0.999, 1 - below_lower_edge, probability)
    return th.log(probability.clamp(min=SMALLEST_PROBABILITY))
