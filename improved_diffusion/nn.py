"""Building blocks of the UNet: layers for 1 to 3 dimensions, normalisation, seeded dropout, timestep embedding, EMA."""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch as th
import torch.nn.functional as F
from torch import nn

from improved_diffusion import kernels
from improved_diffusion.kernels import conv3x3, pointwise

NUM_GROUPS = 32


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial dimensions."""
    return {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


class Conv2d(nn.Conv2d):
    """A convolution over two dimensions. That of 3x3 pixels with padding 1 takes the compiled kernel where it can."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        usual = self.kernel_size == (3, 3) and self.padding == self.stride == self.dilation == (1, 1)
        if usual and self.padding_mode == "zeros" and conv3x3.suits(x, self.weight, self.bias):
            return conv3x3.conv3x3(x, self.weight, self.bias)
        if kernels.avoids_bfloat16(x.dtype):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
        return super().forward(x)


class PointwiseConv1d(nn.Conv1d):
    """A convolution over one dimension with a kernel of size 1, in the form that is fastest on CPUs."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return _pointwise(x, self.weight, self.bias, F.conv1d)


class PointwiseConv2d(nn.Conv2d):
    """A convolution over two dimensions with a kernel of size 1, in the form that is fastest on CPUs."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        if in_channels_last(x):
            return pointwise_channels_last(x, self.weight, self.bias)
        return _pointwise(x, self.weight, self.bias, F.conv2d)


def pointwise_conv_nd(dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) dimensions with a kernel of size 1: one matrix for all positions."""
    if dims == 3:
        return nn.Conv3d(in_channels, out_channels, 1)
    return {1: PointwiseConv1d, 2: PointwiseConv2d}[dims](in_channels, out_channels)


def _pointwise(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, conv) -> th.Tensor:
    if x.dtype == th.bfloat16:
        # Matrix products are faster here: convolutions would copy the image into another layout and back.
        products = th.baddbmm(bias[:, None], weight.flatten(1).expand(len(x), -1, -1), x.flatten(2))
        return products.view(len(x), -1, *x.shape[2:])
    # Dilation changes nothing in a kernel of size 1. Without it, torch on a single thread takes its own convolution
    # for such kernels; with it, that of oneDNN, which is 1.6 times as fast.
    return conv(x, weight, bias, dilation=2)


def in_channels_last(x: th.Tensor) -> bool:
    """Whether `x` [N, C, H, W] has the memory layout channels_last, [N, H, W, C], and is not contiguous too."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=th.channels_last)


def pointwise_channels_last(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """A convolution with a kernel of size 1, in channels_last layout.

    :param x: [N, C, H, W] in channels_last layout.
    :param weight: [out_channels, C], followed by any number of dimensions of size 1. :param bias: [out_channels].
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    weight = weight.flatten(1)
    if pointwise.suits(x, weight, bias):
        return pointwise.pointwise(x, weight, bias)
    if x.dtype == th.bfloat16:
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    # In float32, oneDNN's convolution is twice as fast as torch's matrix product. For the dilation, see `_pointwise`.
    return F.conv2d(x, weight[:, :, None, None], bias, dilation=2)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over `dims` (1, 2 or 3) spatial dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def linear(*args, **kwargs) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero, and return it.

    A residual block that ends with such a module starts as the identity.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups (Wu & He 2018, arXiv 1803.08494), which the whole UNet uses.

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
    """Sinusoidal embedding of timesteps, cosines first (Vaswani et al. 2017, section 3.5).

    :param timesteps: [N], whole numbers or not.
    :param dim: width of the embedding. If it is odd, the last column is zero.
    :param max_period: the wavelengths form a geometric sequence from 2 pi timesteps to 2 pi `max_period`.
    :param reach_end: whether the last wavelength is 2 pi `max_period`; if not, the sequence ends one term earlier.
    :return: float32 [N, dim].
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
    """Update an exponential moving average in place: target += (1 - rate) (source - target)."""
    th._foreach_lerp_(list(target_params), list(source_params), 1 - rate)


_dropout = threading.local()


@contextlib.contextmanager
def dropout_seeds(seeds: Sequence[int]) -> Iterator[None]:
    """Within the `with` block, dropout masks of this thread depend only on the image's seed and the layer.

    So gradient checkpointing computes the same masks twice, a resumed run repeats them, and neither the microbatch nor
    the number of threads changes them.

    :param seeds: a seed for each image of the batches that the layers get.
    """
    previous = getattr(_dropout, "seeds", None)
    _dropout.seeds = seeds
    try:
        yield
    finally:
        _dropout.seeds = previous


class Dropout(nn.Module):
    """Dropout with probability `p` (Srivastava et al. 2014). Within `dropout_seeds`, its masks are reproducible.

    `layer` is the number of the layer in its network, so that each layer has other masks. `UNetModel` sets it.
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
