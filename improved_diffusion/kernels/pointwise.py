"""Convolutions with a kernel of size 1 as compiled operations, in channels_last layout."""

from ctypes import c_int, c_size_t, c_void_p

import torch as th
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels

# Arguments of the compiled functions: addresses, then positions, channels of the input and of the output, whether it is
# the gradient of the input (forward only), and threads.
FORWARD = (*[c_void_p] * 5, *[c_int] * 5)
BACKWARD = (*[c_void_p] * 5, *[c_int] * 4)
CHANNELS = 32  # the numbers of channels must be multiples of it


def suits(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `pointwise` can be used: for `x` [N, C, H, W] in channels_last, with the type of the weights."""
    return (
        kernels.multiplies(x.dtype)
        and x.dim() == 4
        and x.is_cpu
        and weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and x.shape[1] % CHANNELS == 0
        and weight.shape[0] % CHANNELS == 0
        and 0 < x.numel() < kernels.MOST
        and x.numel() // x.shape[1] * weight.shape[0] < kernels.MOST
        and x.is_contiguous(memory_format=th.channels_last)
        and all(t is not None and t.is_cpu and t.dtype == x.dtype for t in (weight, bias))
    )


def pointwise(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """The product of the channels of each position with a matrix, plus `bias`.

    :param x: [N, C, H, W]; `suits` must accept it. :param weight: [out_channels, C]. :param bias: [out_channels].
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    return _Pointwise.apply(x, weight, bias)


class _Pointwise(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=th.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = _multiply(dy, weight, None, backward=True) if of_x else None
        return dx, *(_differentiate(x, dy, weight) if of_weight or of_bias else (None, None))


def _multiply(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, backward: bool = False) -> th.Tensor:
    """The output for `x`, or, if `backward`, the gradient of the input from that of the output, `x`."""
    out, channels = weight.shape
    n, _, height, width = x.shape
    before, after = (out, channels) if backward else (channels, out)
    y = th.empty(n, after, height, width, dtype=x.dtype, device="cpu", memory_format=th.channels_last)
    threads = th.get_num_threads()
    kernels.function("pointwise_forward", FORWARD, x.dtype)(
        kernels.address(x, x.dtype, (n, before, height, width), th.channels_last),
        kernels.address(weight, x.dtype, (out, channels)),
        kernels.address(bias, x.dtype, (out,)),
        *(y.data_ptr(), _room(x.dtype, channels, out, threads)),
        *(n * height * width, channels, out, backward, threads),
    )
    return y


def _differentiate(x: th.Tensor, dy: th.Tensor, weight: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The gradients of weight and bias from that of the output, `dy`."""
    out, channels = weight.shape
    n, _, height, width = x.shape
    dweight, dbias = th.empty_like(weight), weight.new_empty(out)
    threads = th.get_num_threads()
    kernels.function("pointwise_backward", BACKWARD, x.dtype)(
        kernels.address(x, x.dtype, (n, channels, height, width), th.channels_last),
        kernels.address(dy, x.dtype, (n, out, height, width), th.channels_last),
        *(dweight.data_ptr(), dbias.data_ptr(), _room(x.dtype, channels, out, threads)),
        *(n * height * width, channels, out, threads),
    )
    return dweight, dbias


def _room(dtype: th.dtype, channels: int, out: int, threads: int) -> int:
    return kernels.room(
        kernels.function("pointwise_room", (c_size_t,) * 3, dtype, c_size_t)(channels, out, threads)
    )
