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
    return kernels.suits_layout(x) and takes(x.dtype, x.shape, norm, modulation)


def takes(dtype: th.dtype, shape: th.Size, norm: nn.GroupNorm, modulation: th.Tensor | None = None) -> bool:
    """Whether `norm_act` can be used for images of this type and shape in channels_last."""
    return (
        kernels.has("norm_forward", dtype)
        and shape[1] == norm.num_channels
        and shape[1] % CHANNELS == 0
        and norm.num_groups <= MAX_GROUPS
        and 0 < shape.numel() < kernels.MOST
        and _fits(norm.weight, dtype, (norm.num_channels,))
        and _fits(norm.bias, dtype, (norm.num_channels,))
        and (modulation is None or _fits(modulation, dtype, (shape[0], 2 * norm.num_channels)))
    )


def _fits(tensor: th.Tensor | None, dtype: th.dtype, shape: tuple[int, ...]) -> bool:
    return tensor is not None and tensor.dtype == dtype and tensor.is_cpu and tensor.shape == shape


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
        # Only what comes from outside is checked. Python takes a noticeable part of the time of small images.
        given = [
            kernels.address(x, x.dtype, x.shape, th.channels_last),
            kernels.address(weight, x.dtype, (channels,)),
            kernels.address(bias, x.dtype, (channels,)),
            kernels.address(modulation, x.dtype, (n, 2 * channels)),
        ]
        y = th.empty_like(x)
        # means, 1 / sqrt(variance + epsilon), and working memory
        floats = th.empty(2 * n * (groups + channels), dtype=th.float32, device="cpu")
        kernel = kernels.function("norm_forward", FORWARD, x.dtype)
        kernel(
            *(*given, y.data_ptr(), *_parts(floats, n, groups)),
            *(n, height * width, channels, groups, epsilon, activate, th.get_num_threads()),
        )
        ctx.save_for_backward(x, weight, bias, modulation, floats)
        ctx.groups, ctx.activate = groups, activate
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, more):
        if dy is None:
            return more, None, None, None, None, None, None
        x, weight, bias, modulation, floats = ctx.saved_tensors
        n, channels, height, width = x.shape
        dy = dy.contiguous(memory_format=th.channels_last)
        if more is not None:
            more = more.contiguous(memory_format=th.channels_last)
        given = (kernels.address(images, x.dtype, x.shape, th.channels_last) for images in (dy, more))
        dx, dweight, dbias = th.empty_like(x), th.empty_like(weight), th.empty_like(bias)
        dmodulation = None if modulation is None else th.empty_like(modulation)
        means, deviations, sums = _parts(floats, n, ctx.groups)
        kernel = kernels.function("norm_backward", BACKWARD, x.dtype)
        kernel(
            *(*given, x.data_ptr(), weight.data_ptr(), bias.data_ptr(), _pointer(modulation)),
            *(means, deviations, dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr()),
            *(_pointer(dmodulation), sums),
            *(n, height * width, channels, ctx.groups, ctx.activate, th.get_num_threads()),
        )
        return dx, dweight, dbias, dmodulation, None, None, None


def _parts(floats: th.Tensor, n: int, groups: int) -> tuple[int, int, int]:
    """The addresses of the means, of 1 / sqrt(variance + epsilon), and of the working memory in `floats`."""
    start = floats.data_ptr()
    return start, start + 4 * n * groups, start + 8 * n * groups


def _pointer(tensor: th.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
