"""Muon: an optimizer for weight matrices, which makes the momentum orthogonal before each step.

The gradient of a matrix is dominated by a few directions. After orthogonalization, the step is equally long in all
directions, so rare directions are learned as fast as frequent ones.

Jordan et al. 2024: "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon
"""

import torch as th

from improved_diffusion.kernels import update
from improved_diffusion.nn import in_channels_last

MOMENTUM = 0.95
# a, b, c of the polynomial a x + b x^3 + c x^5. Applied five times, it moves singular values between 0.01 and 1 near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# The root mean square of an update, as of AdamW, so that both use the same learning rate (Liu et al. 2025,
# arXiv 2502.16982, eq. 4).
RMS = 0.2


def orthogonalize(matrix: th.Tensor) -> th.Tensor:
    """Move all singular values of a matrix near 1 (from 0.7 to 1.2), by Newton-Schulz iterations.

    An iteration takes X to P X, where P = a I + b S + c S^2 with S = X X^T. P and S commute, so the next S is P^2 S.
    So all iterations are done on S, which for the kernel of a convolution is far smaller than X.

    :param matrix: float32 [M, N].
    :return: float32 [M, N].
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    square = wide @ wide.T
    norm = square.trace().sqrt() + 1e-7
    square /= norm**2
    a, b, c = COEFFICIENTS
    product = None
    for iteration in range(ITERATIONS):
        factor = th.addmm(square, square, square, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if iteration + 1 < ITERATIONS:
            square = factor @ square @ factor
    result = (product / norm) @ wide
    return result if matrix.shape[0] <= matrix.shape[1] else result.T


def rate(shape: th.Size, lr: float) -> float:
    """What a matrix with singular values near 1 is multiplied by to be the step of a parameter of this shape."""
    return lr * RMS * max(shape[0], shape[1:].numel()) ** 0.5


def settings(shape: th.Size, lr: float, weight_decay: float, factor: float) -> update.MuonSettings:
    """What the kernel needs to do as `muon` does, with the gradient multiplied by `factor`."""
    keep = 1 - lr * weight_decay
    return update.MuonSettings(MOMENTUM, factor, keep, rate(shape, lr), *COEFFICIENTS, ITERATIONS)


@th.no_grad()
def muon(param: th.Tensor, gradient: th.Tensor, momentum: th.Tensor, lr: float, weight_decay: float) -> None:
    """Update `param` and its `momentum` in place.

    :param param: [M, ...], used as a matrix with M rows, such as the kernel of a convolution [out, in, height, width].
    :param gradient: of the same shape, float32; it is overwritten.
    """
    momentum.mul_(MOMENTUM).add_(gradient)
    step = gradient.add_(momentum, alpha=MOMENTUM)  # Nesterov momentum
    if in_channels_last(step):  # without a copy: the order of the columns does not matter
        step, param = step.permute(0, 2, 3, 1), param.permute(0, 2, 3, 1)
    if weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.add_(orthogonalize(step.flatten(1)).view_as(param), alpha=-rate(param.shape, lr))
