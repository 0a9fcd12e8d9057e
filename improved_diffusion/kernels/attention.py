"""Self-attention as one compiled operation, on tensors with the channels last."""

from ctypes import c_int, c_void_p

import torch as th
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels

# Arguments of the compiled functions: addresses, then images, positions, heads, width and threads.
FORWARD = (*[c_void_p] * 4, *[c_int] * 5)
BACKWARD = (*[c_void_p] * 6, *[c_int] * 5)
TILE = 16  # the number of positions, and of the channels of a head, must be a multiple of it
MAX_POSITIONS = 1024  # the backward pass holds the gradients of all scores of a head in memory


def suits(qkv: th.Tensor, num_heads: int) -> bool:
    """Whether `attention` can be used on `qkv` [N, T, heads * 3 * width]."""
    return qkv.dim() == 3 and qkv.is_cpu and takes(qkv.dtype, qkv.shape, num_heads)


def takes(dtype: th.dtype, shape: th.Size, num_heads: int) -> bool:
    """Whether `attention` can be used on tensors of this type and shape."""
    positions, channels = shape[1:]
    return (
        kernels.has("attention_forward", dtype)
        and 0 < shape.numel() < kernels.MOST
        and channels % (3 * num_heads * TILE) == 0
        and positions % TILE == 0
        and positions <= MAX_POSITIONS
    )


def attention(qkv: th.Tensor, num_heads: int) -> th.Tensor:
    """Scaled dot-product attention between all T positions (Vaswani et al. 2017, section 3.2.1).

    :param qkv: [N, T, heads * 3 * width], for each head queries, keys, values; `suits` must accept it.
    :return: [N, T, heads * width].
    """
    return _Attention.apply(qkv, num_heads)


class _Attention(th.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads):
        n, positions, channels = qkv.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(n, positions, channels // 3)
        logsums = qkv.new_empty(n, heads, positions, dtype=th.float32)
        width = channels // (3 * heads)
        threads = th.get_num_threads()
        kernel = kernels.function("attention_forward", FORWARD, qkv.dtype)
        room = _room(qkv.dtype, positions, width, threads)
        kernel(
            kernels.address(qkv, qkv.dtype, (n, positions, 3 * heads * width)),
            kernels.address(out, qkv.dtype, (n, positions, heads * width)),
            kernels.address(logsums, th.float32, (n, heads, positions)),
            *(room.data_ptr(), n, positions, heads, width, threads),
        )
        ctx.save_for_backward(qkv, out, logsums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, logsums = ctx.saved_tensors
        n, heads, positions = logsums.shape
        dqkv = th.empty_like(qkv)
        dout = dout.contiguous()
        width = qkv.shape[2] // (3 * heads)
        threads = th.get_num_threads()
        kernel = kernels.function("attention_backward", BACKWARD, qkv.dtype)
        room = _room(qkv.dtype, positions, width, threads)
        full, narrow = (n, positions, 3 * heads * width), (n, positions, heads * width)
        kernel(
            kernels.address(dout, qkv.dtype, narrow),
            kernels.address(qkv, qkv.dtype, full),
            kernels.address(out, qkv.dtype, narrow),
            kernels.address(logsums, th.float32, (n, heads, positions)),
            kernels.address(dqkv, qkv.dtype, full),
            *(room.data_ptr(), n, positions, heads, width, threads),
        )
        return dqkv, None


def _room(dtype: th.dtype, positions: int, width: int, threads: int) -> th.Tensor:
    size = threads * kernels.size_of_room("attention", dtype, positions, width)
    return th.empty(size, dtype=th.float32, device="cpu")
