"""Convolutions with a kernel of size 1 as compiled operations, in channels_last layout."""

import torch as th

from improved_diffusion.kernels import convolution


def suits(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `pointwise` can be used: for `x` [N, C, H, W] in channels_last, with the type of the weights."""
    return weight.dim() == 2 and convolution.suits(x, weight, bias)


def pointwise(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """The product of the channels of each position with a matrix, plus `bias`.

    :param x: [N, C, H, W]; `suits` must accept it. :param weight: [out_channels, C]. :param bias: [out_channels].
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    n, _, height, width = x.shape
    return convolution.convolve("pointwise", (n * height * width,), x, weight, bias)
