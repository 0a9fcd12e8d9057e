"""Group normalisation, scale and shift, and SiLU as one compiled operation, in channels_last layout."""

from ctypes import c_float, c_int, c_void_p

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels

# Arguments of the compiled functions: addresses, then images, positions, channels, groups, epsilon (forward only),
# activate and threads.
FORWARD = (*[c_void_p] * 8, *[c_int] * 4, c_float, c_int, c_int)
BACKWARD = (*[c_void_p] * 13, *[c_int] * 6)
MAX_GROUPS = 1024  # as in kernels.c
CHANNELS = 32  # the number of channels must be a multiple of it


def suits(x: th.Tensor, norm: nn.GroupNorm, modulation: th.Tensor | None = None) -> bool:
    """Whether `norm_act` can be used: `x` must be [N, C, H, W] in channels_last, with the type of the weights."""
    return (
        x.dim() == 4
        and x.is_cpu
        and kernels.has("norm_forward", x.dtype)
        and x.shape[1] == norm.num_channels
        and x.shape[1] % CHANNELS == 0
        and norm.num_groups <= MAX_GROUPS
        and 0 < x.numel() < kernels.MOST
        and x.is_contiguous(memory_format=th.channels_last)
        and _fits(norm.weight, x, (norm.num_channels,))
        and _fits(norm.bias, x, (norm.num_channels,))
        and (modulation is None or _fits(modulation, x, (len(x), 2 * norm.num_channels)))
    )


def _fits(tensor: th.Tensor | None, x: th.Tensor, shape: tuple[int, ...]) -> bool:
    return tensor is not None and tensor.dtype == x.dtype and tensor.is_cpu and tensor.shape == shape


def norm_act(
    norm: nn.GroupNorm, x: th.Tensor, modulation: th.Tensor | None = None, activate: bool = True
) -> tuple[th.Tensor, th.Tensor]:
    """SiLU(norm(x) * (1 + scale) + shift) as one operation, which keeps only `x` for the backward pass.

    :param x: [N, C, H, W]; `suits` must accept it.
    :param modulation: scales, then shifts, [N, 2 C], of x's type; None: no scale and shift.
    :param activate: whether to apply SiLU.
    :return: the result, [N, C, H, W], and `x`. Use the returned `x` for a skip connection: then the backward pass adds
        its gradient to that of the result in the same operation.
    """
    return _NormAct.apply(x, norm.weight, norm.bias, modulation, norm.num_groups, norm.eps, activate)


class _NormAct(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, modulation, groups, epsilon, activate):
        ctx.set_materialize_grads(False)
        if modulation is not None:
            modulation = modulation.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        n, channels, height, width = x.shape
        y = th.empty_like(x)
        # means, then 1 / sqrt(variance + epsilon)
        statistics = th.empty(2, n, groups, dtype=th.float32, device="cpu")
        sums = th.empty(n, 2 * channels, dtype=th.float32, device="cpu")
        kernel = kernels.function("norm_forward", FORWARD, x.dtype)
        kernel(
            kernels.address(x, x.dtype, x.shape, th.channels_last),
            *_addresses_of(x, weight, bias, modulation),
            kernels.address(y, x.dtype, x.shape, th.channels_last),
            *(kernels.address(part, th.float32, (n, groups)) for part in statistics),
            kernels.address(sums, th.float32, (n, 2 * channels)),
            *(n, height * width, channels, groups, epsilon, activate, th.get_num_threads()),
        )
        ctx.save_for_backward(x, weight, bias, modulation, statistics)
        ctx.groups, ctx.activate = groups, activate
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, more):
        if dy is None:
            return more, None, None, None, None, None, None
        x, weight, bias, modulation, statistics = ctx.saved_tensors
        n, channels, height, width = x.shape
        dy = dy.contiguous(memory_format=th.channels_last)
        if more is not None:
            more = more.contiguous(memory_format=th.channels_last)
        sums = th.empty(n, 2 * channels, dtype=th.float32, device="cpu")
        dx, dweight, dbias = th.empty_like(x), th.empty_like(weight), th.empty_like(bias)
        dmodulation = None if modulation is None else th.empty_like(modulation)
        kernel = kernels.function("norm_backward", BACKWARD, x.dtype)
        kernel(
            *(kernels.address(images, x.dtype, x.shape, th.channels_last) for images in (dy, more, x)),
            *_addresses_of(x, weight, bias, modulation),
            *(kernels.address(part, th.float32, (n, ctx.groups)) for part in statistics),
            kernels.address(dx, x.dtype, x.shape, th.channels_last),
            *_addresses_of(x, dweight, dbias, dmodulation),
            kernels.address(sums, th.float32, (n, 2 * channels)),
            *(n, height * width, channels, ctx.groups, ctx.activate, th.get_num_threads()),
        )
        return dx, dweight, dbias, dmodulation, None, None, None


def _addresses_of(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor, modulation: th.Tensor | None
) -> list[int | None]:
    n, channels = x.shape[:2]
    return [
        kernels.address(weight, x.dtype, (channels,)),
        kernels.address(bias, x.dtype, (channels,)),
        kernels.address(modulation, x.dtype, (n, 2 * channels)),
    ]
