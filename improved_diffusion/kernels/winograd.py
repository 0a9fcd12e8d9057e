"""Convolutions of 3x3 pixels by Winograd's minimal filtering as compiled operations, in channels_last layout."""

from ctypes import c_int, c_size_t, c_void_p

import torch as th
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels

# Arguments of the compiled functions: addresses, then images, height, width, channels of the input and of the output,
# whether it is the gradient of the input (forward only), and threads.
FORWARD = (*[c_void_p] * 5, *[c_int] * 7)
BACKWARD = (*[c_void_p] * 5, *[c_int] * 6)
CHANNELS = 32  # the numbers of channels must be multiples of it
TILE = 4  # height and width must be multiples of it
# From this many pixels on, at most this many pairs of channels: the transformed weights take four times the memory, and
# small images have too few tiles to pay for them. It is not the number of images that decides, so that an image comes
# out the same in any batch.
MOST_PAIRS = ((256, 2**18), (64, 2**16))


def suits(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> bool:
    """Whether `conv3x3` can be used: for `x` [N, C, H, W] in channels_last, with the type of the weights."""
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        return False
    height, width = x.shape[2:]
    return (
        kernels.multiplies(x.dtype)
        and x.is_cpu
        and x.shape[1] % CHANNELS == 0
        and weight.shape[0] % CHANNELS == 0
        and height % TILE == 0
        and width % TILE == 0
        and any(
            height * width >= pixels and x.shape[1] * weight.shape[0] <= most for pixels, most in MOST_PAIRS
        )
        and 0 < x.numel() < kernels.MOST
        and len(x) * weight.shape[0] * height * width < kernels.MOST
        and x.is_contiguous(memory_format=th.channels_last)
        and all(t is not None and t.is_cpu and t.dtype == x.dtype for t in (weight, bias))
    )


def conv3x3(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """The convolution with padding 1, in a quarter of the multiplications (Lavin & Gray 2016, arXiv 1509.09308).

    :param x: [N, C, H, W]; `suits` must accept it. :param weight: [out_channels, C, 3, 3]. :param bias: [out_channels].
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    return _Conv3x3.apply(x, weight, bias)


class _Conv3x3(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        weight = weight.contiguous(memory_format=th.channels_last)
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=th.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = _convolve(dy, weight, None, backward=True) if of_x else None
        return dx, *(_differentiate(x, dy, weight) if of_weight or of_bias else (None, None))


def _convolve(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, backward: bool = False) -> th.Tensor:
    """The convolution of `x`, or, if `backward`, the gradient of its input from that of its output, `x`."""
    out, channels = weight.shape[:2]
    n, _, height, width = x.shape
    before, after = (out, channels) if backward else (channels, out)
    y = th.empty(n, after, height, width, dtype=x.dtype, device="cpu", memory_format=th.channels_last)
    threads = th.get_num_threads()
    kernels.function("winograd_forward", FORWARD, x.dtype)(
        kernels.address(x, x.dtype, (n, before, height, width), th.channels_last),
        kernels.address(weight, x.dtype, (out, channels, 3, 3), th.channels_last),
        kernels.address(bias, x.dtype, (out,)),
        *(y.data_ptr(), _room(x.dtype, channels, out, threads)),
        *(n, height, width, channels, out, backward, threads),
    )
    return y


def _differentiate(x: th.Tensor, dy: th.Tensor, weight: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """The gradients of weight and bias from that of the output, `dy`."""
    out, channels = weight.shape[:2]
    n, _, height, width = x.shape
    dweight, dbias = th.empty_like(weight), weight.new_empty(out)
    threads = th.get_num_threads()
    kernels.function("winograd_backward", BACKWARD, x.dtype)(
        kernels.address(x, x.dtype, (n, channels, height, width), th.channels_last),
        kernels.address(dy, x.dtype, (n, out, height, width), th.channels_last),
        *(dweight.data_ptr(), dbias.data_ptr(), _room(x.dtype, channels, out, threads)),
        *(n, height, width, channels, out, threads),
    )
    return dweight, dbias


def _room(dtype: th.dtype, channels: int, out: int, threads: int) -> int:
    return kernels.room(
        kernels.function("winograd_room", (c_size_t,) * 3, dtype, c_size_t)(channels, out, threads)
    )
