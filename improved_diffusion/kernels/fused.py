"""Whole blocks of the UNet as one operation of autograd each, by the compiled kernels.

They compute what the kernels compute one after the other, bit for bit. But for each operation autograd runs some
Python code, and only one thread at a time can run Python: two passes side by side waited for each other for a tenth of
their time.
"""

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

from improved_diffusion.kernels import attention, convolution, norm, pointwise, winograd


def suits_residual(
    x: th.Tensor, modulation: th.Tensor, norms: tuple[nn.Module, nn.Module], convs: tuple[nn.Module, ...]
) -> bool:
    """Whether `residual` can be used, with these normalisations and convolutions."""
    first, second, *skip = convs
    if not (x.dim() == 4 and x.is_cpu and x.is_contiguous(memory_format=th.channels_last)):
        return False
    inner = th.Size((x.shape[0], first.weight.shape[0], *x.shape[2:]))
    return (
        norm.takes(x.dtype, x.shape, norms[0])
        and winograd.takes(x.dtype, x.shape, first.weight, first.bias)
        and norm.takes(x.dtype, inner, norms[1], modulation)
        and winograd.takes(x.dtype, inner, second.weight, second.bias)
        and all(convolution.takes(x.dtype, x.shape, conv.weight, conv.bias) for conv in skip)
    )


def residual(
    x: th.Tensor, modulation: th.Tensor, norms: tuple[nn.Module, nn.Module], convs: tuple[nn.Module, ...]
) -> th.Tensor:
    """A residual block: twice normalisation, SiLU and a 3x3 convolution, plus `x` or a pointwise convolution of it.

    :param x: [N, C, H, W]; `suits_residual` must accept it.
    :param modulation: scales, then shifts of the second normalisation, [N, 2 out_channels].
    :param convs: two convolutions with 3x3 pixels and, if the block changes the number of channels, a pointwise one.
    :return: [N, out_channels, H, W] in channels_last layout.
    """
    settings = [(n.num_groups, n.eps) for n in norms]
    return _Residual.apply(
        x, modulation, settings, *(p for layer in (*norms, *convs) for p in (layer.weight, layer.bias))
    )


class _Residual(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, modulation, settings, *parameters):
        norm1, norm2, (weight1, bias1), (weight2, bias2), *skip = zip(parameters[::2], parameters[1::2])
        sizes = (x.shape[0], *x.shape[2:])
        h1, floats1 = norm.evaluate(x, *norm1, None, *settings[0], True)
        c1 = convolution.evaluate("winograd", sizes, h1, weight1, bias1)
        h2, floats2 = norm.evaluate(c1, *norm2, modulation, *settings[1], True)
        y = convolution.evaluate("winograd", sizes, h2, weight2, bias2)
        y += _pointwise(x, *skip[0]) if skip else x
        ctx.save_for_backward(x, modulation, h1, floats1, c1, h2, floats2, *parameters)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, modulation, h1, floats1, c1, h2, floats2, *parameters = ctx.saved_tensors
        norm1, norm2, (weight1, _), (weight2, _), *skip = zip(parameters[::2], parameters[1::2])
        (groups1, _), (groups2, _) = ctx.settings
        sizes = (x.shape[0], *x.shape[2:])
        dy = dy.contiguous(memory_format=th.channels_last)
        of_conv2 = convolution.differentiate("winograd", sizes, h2, dy, weight2)
        dh2 = convolution.evaluate("winograd", sizes, dy, weight2, None, backward=True)
        dc1, *of_norm2, dmodulation = norm.differentiate(
            dh2, None, c1, *norm2, modulation, floats2, groups2, True
        )
        of_conv1 = convolution.differentiate("winograd", sizes, h1, dc1, weight1)
        dh1 = convolution.evaluate("winograd", sizes, dc1, weight1, None, backward=True)
        more, of_skip = dy, ()
        if skip:
            more, of_skip = _pointwise_gradients(x, dy, skip[0][0])
        dx, *of_norm1, _ = norm.differentiate(dh1, more, x, *norm1, None, floats1, groups1, True)
        return dx, dmodulation, None, *of_norm1, *of_norm2, *of_conv1, *of_conv2, *of_skip


def suits_attention(x: th.Tensor, norm_layer: nn.Module, qkv: nn.Module, proj: nn.Module, heads: int) -> bool:
    """Whether `attention_block` can be used, with these layers."""
    if not (x.dim() == 4 and x.is_cpu and x.is_contiguous(memory_format=th.channels_last)):
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
    return _AttentionBlock.apply(x, (norm_layer.num_groups, norm_layer.eps), heads, *parameters)


class _AttentionBlock(th.autograd.Function):
    @staticmethod
    def forward(ctx, x, settings, heads, *parameters):
        weight, bias, qkv_weight, qkv_bias, proj_weight, proj_bias = parameters
        h, floats = norm.evaluate(x, weight, bias, None, *settings, False)
        qkv = _rows(_pointwise(h, qkv_weight, qkv_bias))
        a, logsums = attention.evaluate(qkv, heads)
        y = _pointwise(_images(a, x), proj_weight, proj_bias)
        y += x
        ctx.save_for_backward(x, h, floats, qkv, a, logsums, *parameters)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, floats, qkv, a, logsums, weight, bias, qkv_weight, _, proj_weight, _ = ctx.saved_tensors
        dy = dy.contiguous(memory_format=th.channels_last)
        da, of_proj = _pointwise_gradients(_images(a, x), dy, proj_weight)
        dqkv = attention.differentiate(_rows(da), qkv, a, logsums)
        dh, of_qkv = _pointwise_gradients(h, _images(dqkv, x), qkv_weight)
        dx, *of_norm, _ = norm.differentiate(dh, dy, x, weight, bias, None, floats, ctx.settings[0], False)
        return dx, None, None, *of_norm, *of_qkv, *of_proj


def _rows(x: th.Tensor) -> th.Tensor:
    """[N, C, H, W] in channels_last as [N, H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _images(rows: th.Tensor, like: th.Tensor) -> th.Tensor:
    """[N, H * W, C] as [N, C, H, W] in channels_last."""
    n, _, height, width = like.shape
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def _pointwise(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    return convolution.evaluate("pointwise", pointwise.sizes(x), x, weight.flatten(1), bias)


def _pointwise_gradients(
    x: th.Tensor, dy: th.Tensor, weight: th.Tensor
) -> tuple[th.Tensor, tuple[th.Tensor, th.Tensor]]:
    """The gradient of `x`, and those of weight and bias."""
    sizes, matrix = pointwise.sizes(x), weight.flatten(1)
    dx = convolution.evaluate("pointwise", sizes, dy, matrix, None, backward=True)
    dweight, dbias = convolution.differentiate("pointwise", sizes, x, dy, matrix)
    return dx, (dweight.view_as(weight), dbias)
