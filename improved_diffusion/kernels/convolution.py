"""What the compiled convolutions have in common: when they can be used, and their gradients."""

from ctypes import c_int, c_void_p

import torch as th
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels

CHANNELS = 32  # the numbers of channels must be multiples of it


def suits(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `convolve` can be used: for `x` [N, C, H, W] in channels_last, with the type of the weights."""
    return kernels.suits_layout(x) and takes(x.dtype, x.shape, weight, bias)


def takes(dtype: th.dtype, shape: th.Size, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `convolve` can be used for images of this type and shape in channels_last."""
    return (
        kernels.multiplies(dtype)
        and shape[1] == weight.shape[1]
        and shape[1] % CHANNELS == 0
        and weight.shape[0] % CHANNELS == 0
        and 0 < shape.numel() < kernels.MOST
        and shape.numel() // shape[1] * weight.shape[0] < kernels.MOST
        and all(t is not None and t.is_cpu and t.dtype == dtype for t in (weight, bias))
    )


def convolve(
    name: str, sizes: tuple[int, ...], x: th.Tensor, weight: th.Tensor, bias: th.Tensor
) -> th.Tensor:
    """The convolution of `x` that keeps its height and width, by the compiled functions of this name.

    :param name: such as "conv3x3", for the functions conv3x3_room, conv3x3_forward and conv3x3_backward.
    :param sizes: the sizes of `x` that they take, without its channels. The room depends on all but the first.
    :param x: [N, C, H, W]; `suits` must accept it. :param weight: [out_channels, C, ...]. :param bias: [out_channels].
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    return _Convolution.apply(x, weight, bias, name, sizes)


class _Convolution(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, name, sizes):
        weight = weight.contiguous(memory_format=layout(weight))
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.sizes = name, sizes
        return _evaluate(name, sizes, x, weight, bias.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=th.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        if of_x:
            dx = _evaluate(ctx.name, ctx.sizes, dy, weight, None, backward=True)
        if of_weight or of_bias:
            dweight, dbias = _differentiate(ctx.name, ctx.sizes, x, dy, weight)
        return dx, dweight, dbias, None, None


def layout(weight: th.Tensor) -> th.memory_format:
    """The memory format in which the kernels take `weight`."""
    return th.channels_last if weight.dim() == 4 else th.contiguous_format


def _evaluate(
    name: str,
    sizes: tuple[int, ...],
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    backward: bool = False,
) -> th.Tensor:
    """The convolution of `x`, or, if `backward`, the gradient of its input from that of its output, `x`."""
    out, channels = weight.shape[:2]
    n, _, height, width = x.shape
    before, after = (out, channels) if backward else (channels, out)
    y = th.empty(n, after, height, width, dtype=x.dtype, device="cpu", memory_format=th.channels_last)
    threads = th.get_num_threads()
    # Addresses, then sizes, channels of the input and of the output, whether it is the gradient, and threads.
    arguments = (*[c_void_p] * 5, *[c_int] * (len(sizes) + 4))
    kernels.function(f"{name}_forward", arguments, x.dtype)(
        kernels.address(x, x.dtype, (n, before, height, width), th.channels_last),
        kernels.address(weight, x.dtype, tuple(weight.shape), layout(weight)),
        kernels.address(bias, x.dtype, (out,)),
        *(y.data_ptr(), _room(name, x.dtype, *sizes[1:], channels, out, threads)),
        *(*sizes, channels, out, backward, threads),
    )
    return y


def _differentiate(
    name: str, sizes: tuple[int, ...], x: th.Tensor, dy: th.Tensor, weight: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """The gradients of weight and bias from that of the output, `dy`."""
    out, channels = weight.shape[:2]
    n, _, height, width = x.shape
    dweight, dbias = th.empty_like(weight), weight.new_empty(out)
    threads = th.get_num_threads()
    # Addresses, then sizes, channels of the input and of the output, and threads.
    arguments = (*[c_void_p] * 5, *[c_int] * (len(sizes) + 3))
    kernels.function(f"{name}_backward", arguments, x.dtype)(
        kernels.address(x, x.dtype, (n, channels, height, width), th.channels_last),
        kernels.address(dy, x.dtype, (n, out, height, width), th.channels_last),
        *(dweight.data_ptr(), dbias.data_ptr(), _room(name, x.dtype, *sizes[1:], channels, out, threads)),
        *(*sizes, channels, out, threads),
    )
    return dweight, dbias


def _room(name: str, dtype: th.dtype, *sizes: int) -> int:
    return kernels.room(kernels.size_of_room(name, dtype, *sizes))
