"""Group normalisation, modulation and SiLU as one operation on images in channels_last layout."""

from ctypes import c_float, c_int, c_void_p

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels

# Of the compiled functions: addresses, sizes, epsilon, whether to activate, threads.
FORWARD = (*[c_void_p] * 8, *[c_int] * 4, c_float, c_int, c_int)
BACKWARD = (*[c_void_p] * 13, *[c_int] * 6)
MAX_GROUPS = 1024  # of kernels.c
CHANNELS = 32  # a multiple of so many can be worked on


def suits(x: th.Tensor, norm: nn.GroupNorm) -> bool:
    """Whether `norm_act` can be used: on images [N, C, H, W] in channels_last, of the normalisation's type."""
    return (
        x.dim() == 4
        and x.device.type == "cpu"
        and kernels.has("norm_forward", x.dtype)
        and x.dtype == norm.weight.dtype
        and x.shape[1] % CHANNELS == 0
        and norm.num_groups <= MAX_GROUPS
        and x.numel() > 0
        and x.is_contiguous(memory_format=th.channels_last)
    )


def norm_act(
    norm: nn.GroupNorm, x: th.Tensor, modulation: th.Tensor | None = None, activate: bool = True
) -> tuple[th.Tensor, th.Tensor]:
    """SiLU(norm(x) * (1 + scale) + shift), in one operation that keeps nothing but `x` for the backward pass.

    :param x: see `suits`.
    :param modulation: scales and shifts, [N, 2 C] of the type of `x`; None: without.
    :param activate: False: without SiLU.
    :return: the result, and `x` for what else is to be made of it: the gradients of both are added up on the way.
    """
    return _NormAct.apply(x, norm.weight, norm.bias, modulation, norm.num_groups, norm.eps, activate)


class _NormAct(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, modulation, groups, epsilon, activate):
        ctx.set_materialize_grads(False)
        if modulation is not None:
            modulation = modulation.contiguous()
        n, channels, height, width = x.shape
        y = th.empty_like(x)
        statistics = th.empty(n * 2 * groups)  # means, then what follows from the variances
        sums = th.empty(n * 2 * channels)
        kernel = kernels.function("norm_forward", FORWARD, x.dtype)
        kernel(
            *(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), _address(modulation), y.data_ptr()),
            *(statistics.data_ptr(), statistics.data_ptr() + 4 * n * groups, sums.data_ptr()),
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
        sums = th.empty(n * 2 * channels)
        dx, dweight, dbias = th.empty_like(x), th.empty_like(weight), th.empty_like(bias)
        dmodulation = None if modulation is None else th.empty_like(modulation)
        kernel = kernels.function("norm_backward", BACKWARD, x.dtype)
        kernel(
            *(dy.data_ptr(), _address(more), x.data_ptr(), weight.data_ptr(), bias.data_ptr()),
            *(_address(modulation), statistics.data_ptr(), statistics.data_ptr() + 4 * n * ctx.groups),
            *(dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), _address(dmodulation), sums.data_ptr()),
            *(n, height * width, channels, ctx.groups, ctx.activate, th.get_num_threads()),
        )
        return dx, dweight, dbias, dmodulation, None, None, None


def _address(tensor: th.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
