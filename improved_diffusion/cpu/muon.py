"""Muon: steps along the momentum of a weight matrix, made orthogonal.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
A gradient of a matrix is mostly a sum of few directions. Made orthogonal, all directions are followed equally far, so
that the rare ones are learned as fast as the frequent ones.
"""

import torch as th

MOMENTUM = 0.95
# Of the odd polynomial a x + b x^3 + c x^5, which five times over takes singular values from 0.01 to 1 near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# The root mean square of an update of AdamW is near 0.2; so the same learning rate serves both
# (Liu et al. 2025, arXiv 2502.16982, equation 4).
RMS = 0.2


def orthogonalize(matrix: th.Tensor, dtype: th.dtype = th.float32) -> th.Tensor:
    """The nearest matrix whose singular values are all near 1 (from 0.7 to 1.2), by Newton-Schulz iterations.

    :param matrix: [M, N]. :param dtype: of the products; 16 bits suffice.
    :return: float32 [M, N].
    """
    x = matrix / (th.linalg.vector_norm(matrix) + 1e-7)
    x = (x.T if matrix.shape[0] > matrix.shape[1] else x).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


@th.no_grad()
def muon(
    param: th.Tensor,
    gradient: th.Tensor,
    momentum: th.Tensor,
    lr: float,
    weight_decay: float,
    dtype: th.dtype = th.float32,
) -> None:
    """One update of `param` and its `momentum`, in place.

    :param param: [M, ...]: a matrix of M rows, such as the kernel of a convolution [out, in, height, width].
    :param gradient: of the same shape, in 32 bits; it is overwritten.
    :param dtype: of the products.
    """
    momentum.mul_(MOMENTUM).add_(gradient)
    step = gradient.add_(momentum, alpha=MOMENTUM)  # Nesterov's
    matrix = step.reshape(len(step), -1)
    update = orthogonalize(matrix, dtype).view_as(param)
    param.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * RMS * max(matrix.shape) ** 0.5)
