"""Building blocks of the UNet: layers by dimension, normalisation, seeded dropout, timestep embeddings, EMA."""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator

import torch as th
import torch.nn.functional as F
from torch import nn

NUM_GROUPS = 32


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


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
            f"--num_channels / --channel_mult: a layer of {channels} channels cannot be normalised in "
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
def dropout_seed(seed: int) -> Iterator[None]:
    """Make the dropout masks drawn by this thread within the block a function of `seed` and the layer alone.

    Masks then depend neither on other threads nor on how often a layer is evaluated, so gradient
    checkpointing recomputes the same ones and a resumed run repeats them.
    """
    previous = getattr(_dropout, "seed", None)
    _dropout.seed = seed
    try:
        yield
    finally:
        _dropout.seed = previous


class Dropout(nn.Module):
    """Dropout with probability `p` whose masks can be fixed by `dropout_seed`.

    `layer` tells apart the layers of one network; `UNetModel` numbers its own.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.layer = 0

    def forward(self, x: th.Tensor) -> th.Tensor:
        if not self.training or self.p == 0:
            return x
        seed = getattr(_dropout, "seed", None)
        if seed is None:
            return F.dropout(x, self.p)
        generator = th.Generator(x.device).manual_seed((seed * 1_000_003 + self.layer) % 2**63)
        keep = th.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        return x * keep.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
