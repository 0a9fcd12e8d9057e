"""Building blocks of the UNet: layers by dimension, normalisation, seeded dropout, timestep embeddings, EMA."""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch as th
import torch.nn.functional as F
from torch import nn

NUM_GROUPS = 32


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


class PointwiseConv1d(nn.Conv1d):
    """A convolution with a kernel of size 1 along one dimension, as fast as CPUs can do it."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return _pointwise(x, self.weight, self.bias, F.conv1d)


class PointwiseConv2d(nn.Conv2d):
    """A convolution with a kernel of size 1 over two dimensions, as fast as CPUs can do it."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        if in_channels_last(x):
            return pointwise_channels_last(x, self.weight, self.bias)
        return _pointwise(x, self.weight, self.bias, F.conv2d)


def pointwise_conv_nd(dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A convolution with a kernel of size 1 over `dims` (1, 2 or 3) dimensions: a matrix for every position."""
    if dims == 3:
        return nn.Conv3d(in_channels, out_channels, 1)
    return {1: PointwiseConv1d, 2: PointwiseConv2d}[dims](in_channels, out_channels)


def _pointwise(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, conv) -> th.Tensor:
    if x.dtype == th.bfloat16:
        # Products of matrices reach the processor's 16-bit peak, where convolutions reorder the image twice.
        products = th.baddbmm(bias[:, None], weight.flatten(1).expand(len(x), -1, -1), x.flatten(2))
        return products.view(len(x), -1, *x.shape[2:])
    # Any dilation means the same to a kernel of size 1. On a single thread, torch hands such kernels to its own
    # slow convolution unless they are dilated; oneDNN's is 1.6 times as fast.
    return conv(x, weight, bias, dilation=2)


def in_channels_last(x: th.Tensor) -> bool:
    """Whether `x` [N, C, H, W] lies in memory as [N, H, W, C], and not as it says."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=th.channels_last)


def pointwise_channels_last(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """A convolution with a kernel of size 1 of `x` [N, C, H, W] in channels_last layout, which the result has too.

    :param weight: [out_channels, C] and any dimensions of size 1.
    """
    weight = weight.flatten(1)
    if x.dtype == th.bfloat16:
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    # oneDNN's convolutions in 32 bits are twice as fast as the products of torch's library of linear algebra.
    return F.conv2d(x, weight[:, :, None, None], bias, dilation=2)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over `dims` (1, 2 or 3) spatial dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def linear(*args, **kwargs) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups (Wu & He 2018), as used throughout the UNet.

    :raises ValueError: `channels` is not a multiple of 32.
    """
    if channels % NUM_GROUPS:
        raise ValueError(
            f"channels {channels}: cannot be normalised in "
            f"{NUM_GROUPS} groups; every level needs a multiple of {NUM_GROUPS} channels"
        )
    return nn.GroupNorm(NUM_GROUPS, channels)


def timestep_embedding(
    timesteps: th.Tensor, dim: int, max_period: float = 10000, reach_end: bool = False
) -> th.Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps, cosines first (Vaswani et al. 2017, sec. 3.5).

    :param timesteps: shape [N].
    :param dim: width of the embedding; an odd one is padded with a zero.
    :param max_period: the wavelengths, in timesteps, grow geometrically from 2 pi towards 2 pi times this.
    :param reach_end: let the last one be that long; otherwise the one after it would be.
    :return: float32, shape [N, dim].
    """
    half = dim // 2
    frequencies = th.exp(
        -math.log(max_period)
        * th.arange(half, dtype=th.float32, device=timesteps.device)
        / (half - 1 if reach_end else half)
    )
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = th.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


@th.no_grad()
def update_ema(
    target_params: Iterable[th.Tensor], source_params: Iterable[th.Tensor], rate: float = 0.99
) -> None:
    """Move an exponential moving average towards the current parameters: target += (1 - rate)(source - target)."""
    th._foreach_lerp_(list(target_params), list(source_params), 1 - rate)


_dropout = threading.local()


@contextlib.contextmanager
def dropout_seeds(seeds: Sequence[int]) -> Iterator[None]:
    """Make the dropout masks drawn by this thread within the block a function of the image's seed and the layer.

    Masks then depend neither on other images and threads nor on how often a layer is evaluated, so gradient
    checkpointing recomputes the same ones, a resumed run repeats them, and a batch may be cut anywhere.

    :param seeds: one for each image of the batches that the layers are given.
    """
    previous = getattr(_dropout, "seeds", None)
    _dropout.seeds = seeds
    try:
        yield
    finally:
        _dropout.seeds = previous


class Dropout(nn.Module):
    """Dropout with probability `p` whose masks can be fixed by `dropout_seeds`.

    `layer` tells apart the layers of one network; `UNetModel` numbers its own.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.layer = 0

    def forward(self, x: th.Tensor) -> th.Tensor:
        if not self.training or self.p == 0:
            return x
        seeds = getattr(_dropout, "seeds", None)
        if seeds is None:
            return F.dropout(x, self.p)
        assert len(seeds) == len(x)
        keep = th.empty_like(x)
        generator = th.Generator(x.device)
        for image, seed in zip(keep, seeds):
            image.bernoulli_(
                1 - self.p, generator=generator.manual_seed((seed * 1_000_003 + self.layer) % 2**63)
            )
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
