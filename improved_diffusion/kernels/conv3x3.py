"""Convolutions of 3x3 pixels as compiled operations, in channels_last layout.

They are computed by Winograd's minimal filtering, in a quarter of the multiplications (Lavin & Gray 2016, arXiv
1509.09308), or, where the processor multiplies tiles, as they are defined.
"""

import torch as th

from improved_diffusion import kernels
from improved_diffusion.kernels import convolution

TILE = 4  # of minimal filtering: height and width must be multiples of it
# From this many pixels on, at most this many pairs of channels: the transformed weights take four times the memory, and
# small images have too few tiles to pay for them. It is not the number of images that decides, so that an image comes
# out the same in any batch.
MOST_PAIRS = ((256, 2**18), (64, 2**16))
# Those of 4x4 pixels pay too in bfloat16. In float32 they do on an AMD processor; others were not measured.
MOST_PAIRS_IN_BFLOAT16 = (*MOST_PAIRS, (16, 2**16))


def suits(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `conv3x3` can be used: for `x` [N, C, H, W] in channels_last, with the type of the weights."""
    return kernels.suits_layout(x) and takes(x.dtype, x.shape, weight, bias)


def takes(dtype: th.dtype, shape: th.Size, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `conv3x3` can be used for images of this type and shape in channels_last."""
    if weight.shape[2:] != (3, 3) or not convolution.takes(dtype, shape, weight, bias):
        return False
    if kernels.has_tiles(dtype):
        return True
    height, width = shape[2:]
    pairs = weight.shape[0] * weight.shape[1]
    return (
        height % TILE == 0
        and width % TILE == 0
        and any(
            height * width >= pixels and pairs <= most
            for pixels, most in (MOST_PAIRS_IN_BFLOAT16 if dtype == th.bfloat16 else MOST_PAIRS)
        )
    )


def conv3x3(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """The convolution with padding 1.

    :param x: [N, C, H, W]; `suits` must accept it. :param weight: [out_channels, C, 3, 3]. :param bias: [out_channels].
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    return convolution.convolve("conv3x3", (len(x), *x.shape[2:]), x, weight, bias)
