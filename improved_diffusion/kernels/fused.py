"""Whole blocks of the UNet as one operation of autograd each, by the compiled kernels.

They compute what the kernels compute one after the other, bit for bit. But Python code runs before and after each
operation, and only one thread at a time can run Python: with an operation for each layer, two passes side by side
waited for each other for a tenth of their time.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_void_p

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from improved_diffusion import kernels
from improved_diffusion.kernels import attention, conv3x3, convolution, norm

OF_RESIDUAL = (
    *("x", "modulation", "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"),
    *("weight1", "bias1", "weight2", "bias2", "skip_weight", "skip_bias"),
)
OF_ATTENTION = ("x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")


def _structure(name: str, addresses: tuple[str, ...], ints: tuple[str, ...], floats: tuple[str, ...]) -> type:
    fields = [(address, c_void_p) for address in addresses]
    fields += [(number, c_int) for number in ints] + [(number, c_float) for number in floats]
    return type(name, (Structure,), {"_fields_": fields})


# As in kernels.c.
_ResidualOf = _structure(
    "_ResidualOf",
    (*OF_RESIDUAL, "h1", "c1", "h2", "skip", "y", "floats", "room"),
    ("images", "height", "width", "channels", "out", "groups1", "groups2", "threads"),
    ("epsilon1", "epsilon2"),
)
_ResidualGradients = _structure("_ResidualGradients", (*OF_RESIDUAL, "h", "c1", "skip", "y"), (), ())
_AttentionOf = _structure(
    "_AttentionOf",
    (*OF_ATTENTION, "h", "qkv", "a", "y", "floats", "logsums", "room"),
    ("images", "positions", "heads", "width", "groups", "threads"),
    ("epsilon",),
)
_AttentionGradients = _structure("_AttentionGradients", (*OF_ATTENTION, "h", "qkv", "y"), (), ())


def suits_residual(
    x: th.Tensor, modulation: th.Tensor, norms: tuple[nn.Module, nn.Module], convs: tuple[nn.Module, ...]
) -> bool:
    """Whether `residual` can be used, with these normalisations and convolutions."""
    first, second, *skip = convs
    if not kernels.suits_layout(x):
        return False
    inner = th.Size((x.shape[0], first.weight.shape[0], *x.shape[2:]))
    return (
        norm.takes(x.dtype, x.shape, norms[0])
        and conv3x3.takes(x.dtype, x.shape, first.weight, first.bias)
        and norm.takes(x.dtype, inner, norms[1], modulation)
        and conv3x3.takes(x.dtype, inner, second.weight, second.bias)
        and all(convolution.takes(x.dtype, x.shape, conv.weight, conv.bias) for conv in skip)
    )


def residual(
    x: th.Tensor, modulation: th.Tensor, norms: tuple[nn.Module, nn.Module], convs: tuple[nn.Module, ...]
) -> th.Tensor:
    """A residual block: twice normalisation, SiLU and a 3x3 convolution, plus `x` or a pointwise convolution of it.

    :param x: [N, C, H, W]; `suits_residual` must accept it.
    :param modulation: scales, then shifts of the second normalisation, [N, 2 out_channels].
    :param convs: two convolutions of 3x3 pixels and, if the block changes the number of channels, a pointwise one.
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    groups, epsilons = [n.num_groups for n in norms], [n.eps for n in norms]
    parameters = (p for layer in (*norms, *convs) for p in (layer.weight, layer.bias))
    return _Residual.apply(x, modulation, groups, epsilons, *parameters)


class _Residual(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, modulation, groups, epsilons, *parameters):
        n, channels, height, width = x.shape
        modulation, *parameters = _in_layout(modulation, *parameters)
        out = parameters[4].shape[0]
        pixels = n * height * width
        # h1, c1 and h2, for the backward pass
        kept = x.new_empty(pixels * (channels + 2 * out))
        floats = x.new_empty(2 * n * (sum(groups) + channels + out), dtype=th.float32)
        skip = x.new_empty(pixels * out) if len(parameters) > 8 else None
        y = _images(x, out)
        ctx.save_for_backward(x, modulation, kept, floats, *parameters)
        ctx.groups, ctx.epsilons = groups, epsilons
        block = _residual_of(x, modulation, kept, floats, parameters, groups, epsilons)
        block.skip, block.y = None if skip is None else skip.data_ptr(), y.data_ptr()
        kernels.function("residual_forward", (POINTER(_ResidualOf),), x.dtype)(ctypes.byref(block))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, modulation, kept, floats, *parameters = ctx.saved_tensors
        n, channels, height, width = x.shape
        out = parameters[4].shape[0]
        pixels = n * height * width
        dy = dy.contiguous(memory_format=th.channels_last)
        gradients = [th.empty_like(t) for t in (x, modulation, *parameters)]
        scratch = x.new_empty(pixels * (max(channels, out) + out + channels))
        h = scratch.data_ptr()
        c1 = h + scratch.element_size() * pixels * max(channels, out)
        skip = c1 + scratch.element_size() * pixels * out
        addresses = [t.data_ptr() for t in gradients] + [None] * (12 - len(gradients))
        given = _ResidualGradients(
            *addresses, h, c1, skip, kernels.address(dy, x.dtype, (n, out, height, width), th.channels_last)
        )
        block = _residual_of(x, modulation, kept, floats, parameters, ctx.groups, ctx.epsilons)
        arguments = (POINTER(_ResidualOf), POINTER(_ResidualGradients))
        kernel = kernels.function("residual_backward", arguments, x.dtype)
        kernel(ctypes.byref(block), ctypes.byref(given))
        dx, dmodulation, *others = gradients
        return dx, dmodulation, None, None, *others


def _residual_of(x, modulation, kept, floats, parameters, groups, epsilons) -> Structure:
    """The C structure residual, without its result."""
    n, channels, height, width = x.shape
    out, threads = parameters[4].shape[0], th.get_num_threads()
    room = max(
        kernels.size_of_room("conv3x3", x.dtype, height, width, channels, out, threads),
        kernels.size_of_room("conv3x3", x.dtype, height, width, out, out, threads),
        kernels.size_of_room("pointwise", x.dtype, channels, out, threads),
    )
    h1, image = kept.data_ptr(), kept.element_size() * n * height * width
    c1 = h1 + image * channels
    return _ResidualOf(
        *(x.data_ptr(), modulation.data_ptr(), *(p.data_ptr() for p in parameters)),
        *([None] * (10 - len(parameters))),
        *(h1, c1, c1 + image * out, None, None, floats.data_ptr(), kernels.room(room)),
        *(n, height, width, channels, out, *groups, threads, *epsilons),
    )


def suits_attention(x: th.Tensor, norm_layer: nn.Module, qkv: nn.Module, proj: nn.Module, heads: int) -> bool:
    """Whether `attention_block` can be used, with these layers."""
    if not kernels.suits_layout(x):
        return False
    n, channels, height, width = x.shape
    return (
        norm.takes(x.dtype, x.shape, norm_layer)
        and all(convolution.takes(x.dtype, x.shape, layer.weight, layer.bias) for layer in (qkv, proj))
        and attention.takes(x.dtype, th.Size((n, height * width, 3 * channels)), heads)
    )


def attention_block(
    x: th.Tensor, norm_layer: nn.Module, qkv: nn.Module, proj: nn.Module, heads: int
) -> th.Tensor:
    """A block of self-attention: normalisation, a pointwise convolution to queries, keys and values, attention, another
    pointwise convolution, plus `x`.

    :param x: [N, C, H, W]; `suits_attention` must accept it. :return: [N, C, H, W] in channels_last layout.
    """
    parameters = (p for layer in (norm_layer, qkv, proj) for p in (layer.weight, layer.bias))
    return _AttentionBlock.apply(x, heads, norm_layer.num_groups, norm_layer.eps, *parameters)


class _AttentionBlock(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, heads, groups, epsilon, *parameters):
        n, channels, height, width = x.shape
        parameters = _in_layout(*parameters)
        positions = height * width
        kept = x.new_empty(n * positions * 5 * channels)  # h, qkv and a
        floats = x.new_empty(2 * n * (groups + channels) + n * heads * positions, dtype=th.float32)
        y = _images(x, channels)
        ctx.save_for_backward(x, kept, floats, *parameters)
        ctx.settings = heads, groups, epsilon
        block = _attention_of(x, kept, floats, parameters, *ctx.settings)
        block.y = y.data_ptr()
        kernels.function("attending_forward", (POINTER(_AttentionOf),), x.dtype)(ctypes.byref(block))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, kept, floats, *parameters = ctx.saved_tensors
        n, channels, height, width = x.shape
        dy = dy.contiguous(memory_format=th.channels_last)
        gradients = [th.empty_like(t) for t in (x, *parameters)]
        scratch = x.new_empty(n * height * width * 4 * channels)
        h = scratch.data_ptr()
        given = _AttentionGradients(
            *(t.data_ptr() for t in gradients),
            *(h, h + scratch.element_size() * n * height * width * channels),
            kernels.address(dy, x.dtype, x.shape, th.channels_last),
        )
        block = _attention_of(x, kept, floats, parameters, *ctx.settings)
        arguments = (POINTER(_AttentionOf), POINTER(_AttentionGradients))
        kernel = kernels.function("attending_backward", arguments, x.dtype)
        kernel(ctypes.byref(block), ctypes.byref(given))
        dx, *others = gradients
        return dx, None, None, None, *others


def _attention_of(x, kept, floats, parameters, heads, groups, epsilon) -> Structure:
    """The C structure attending, without its result."""
    n, channels, height, width = x.shape
    positions, threads = height * width, th.get_num_threads()
    room = max(
        threads * kernels.size_of_room("attention", x.dtype, positions, channels // heads),
        kernels.size_of_room("pointwise", x.dtype, channels, 3 * channels, threads),
    )
    h, one = kept.data_ptr(), kept.element_size() * n * positions * channels
    statistics = floats.data_ptr()
    return _AttentionOf(
        *(x.data_ptr(), *(p.data_ptr() for p in parameters), h, h + one, h + 4 * one, None),
        *(statistics, statistics + 4 * 2 * n * (groups + channels), kernels.room(room)),
        *(n, positions, heads, channels // heads, groups, threads, epsilon),
    )


def _in_layout(*tensors: th.Tensor) -> list[th.Tensor]:
    """The tensors as the kernels need them in memory."""
    return [t.contiguous(memory_format=convolution.layout(t)) for t in tensors]


def _images(like: th.Tensor, channels: int) -> th.Tensor:
    n, _, height, width = like.shape
    return th.empty(
        n, channels, height, width, dtype=like.dtype, device="cpu", memory_format=th.channels_last
    )
