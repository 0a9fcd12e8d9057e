"""The UNet of improved-diffusion: residual blocks with timestep conditioning, self-attention, skip connections."""

import math
from collections.abc import Sequence

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from improved_diffusion import kernels
from improved_diffusion.kernels import attention, fused
from improved_diffusion.kernels.norm import norm_act, suits
from improved_diffusion.nn import (
    Conv2d,
    Dropout,
    PointwiseConv2d,
    avg_pool_nd,
    conv_nd,
    in_channels_last,
    linear,
    normalization,
    pointwise_channels_last,
    pointwise_conv_nd,
    timestep_embedding,
    zero_module,
)

FUSED_ATTENTION_LENGTH = 128  # from this many positions on, torch's own attention is faster, in float32
DDPM_EPSILON = 1e-6  # epsilon of the normalisations in the code of Ho et al. 2020; torch's default is 1e-5


class TimestepEmbedSequential(nn.Sequential):
    """Layers in sequence. The residual blocks among them get the timestep embedding as a second argument.

    Instead of the embedding, `forward` also takes its projections for all blocks (see `project`).
    """

    def forward(self, x: th.Tensor, emb: "th.Tensor | Projected") -> th.Tensor:
        for layer in self:
            if not isinstance(layer, ResBlock):
                x = layer(x)
            elif isinstance(emb, dict):
                x = layer.evaluate(x, emb[layer])
            else:
                x = layer(x, emb)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, followed by a 3x3 convolution if `use_conv`.

    Input [N, C, *size], output [N, C, *(2 size)]. Of three dimensions, only the last two are enlarged.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2):
        super().__init__()
        self.channels = channels
        self.dims = dims
        self.conv = conv_nd(dims, channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: th.Tensor) -> th.Tensor:
        assert x.shape[1] == self.channels
        scale = (1, 2, 2) if self.dims == 3 else 2
        x = F.interpolate(x, scale_factor=scale, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution if `use_conv`, otherwise average pooling.

    Input [N, C, *size], output [N, C, *(size / 2)]. Of three dimensions, only the last two are reduced.

    :param pad_end: pad the image with zeros only below and on the right, not on all sides. For two dimensions.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, pad_end: bool = False):
        super().__init__()
        self.channels = channels
        self.pad_end = pad_end and use_conv
        assert dims == 2 or not self.pad_end
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=0 if pad_end else 1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: th.Tensor) -> th.Tensor:
        assert x.shape[1] == self.channels
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class ResBlock(nn.Module):
    """A residual block: two normalised convolutions with the timestep embedding between them, and a skip connection.

    The embedding is added to the output of the first convolution. With `use_scale_shift_norm`, it scales and shifts
    the second normalisation instead (Nichol & Dhariwal 2021, appendix A).

    :param channels: channels of the input.
    :param emb_channels: width of the timestep embedding.
    :param dropout: the probability of dropout before the second convolution.
    :param out_channels: channels of the output; by default those of the input.
    :param use_conv: whether the skip connection changes the number of channels by a 3x3 convolution; otherwise, by a
        1x1 convolution.
    :param use_checkpoint: recompute the block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            conv_nd(dims, channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels),
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = pointwise_conv_nd(dims, channels, out_channels)

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        """:param x: [N, channels, *size]; :param emb: [N, emb_channels]; :return: [N, out_channels, *size]."""
        return self.evaluate(x, self.emb_layers(emb))

    def evaluate(self, x: th.Tensor, projected: th.Tensor) -> th.Tensor:
        """`forward` with the embedding already projected by `emb_layers`: [N, out_channels], or twice as many channels
        with `use_scale_shift_norm`."""
        if self.use_checkpoint and th.is_grad_enabled():
            return checkpoint(self._evaluate, x, projected, use_reentrant=False)
        return self._evaluate(x, projected)

    def _evaluate(self, x: th.Tensor, projected: th.Tensor) -> th.Tensor:
        layers = self._fusible()
        if layers is not None and fused.suits_residual(x, projected, *layers):
            return fused.residual(x, projected, *layers)
        norm, _, conv = self.in_layers
        h, x = normalize(norm, x)
        h = conv(h)
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            h, _ = normalize(norm, h, modulation=projected)
        else:
            h, _ = normalize(norm, h + projected.reshape(*projected.shape, *[1] * (h.dim() - 2)))
        return self.skip_connection(x) + conv(dropout(h))

    def _fusible(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]] | None:
        """The normalisations and convolutions of a block as `fused.residual` computes it; None for other blocks."""
        norm1, _, conv1 = self.in_layers
        norm2, _, dropout, conv2 = self.out_layers
        skip = () if isinstance(self.skip_connection, nn.Identity) else (self.skip_connection,)
        usual = isinstance(conv1, Conv2d) and all(isinstance(layer, PointwiseConv2d) for layer in skip)
        if not (usual and self.use_scale_shift_norm) or (dropout.p and self.training):
            return None
        return (norm1, norm2), (conv1, conv2, *skip)


Projected = dict[ResBlock, th.Tensor]


def project(blocks: Sequence[ResBlock], emb: th.Tensor) -> Projected:
    """The projections of the timestep embedding `emb` [N, emb_channels] by the `emb_layers` of all `blocks`.

    They are computed as one product with a tall matrix, which is faster than a product for each of two dozen blocks.
    """
    layers = [block.emb_layers[1] for block in blocks]
    weight, bias = (th.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    projected = F.linear(F.silu(emb), weight, bias)
    return dict(zip(blocks, projected.split([layer.out_features for layer in layers], dim=1)))


def normalize(
    norm: nn.GroupNorm, x: th.Tensor, modulation: th.Tensor | None = None, activate: bool = True
) -> tuple[th.Tensor, th.Tensor]:
    """SiLU(norm(x) * (1 + scale) + shift), by the compiled kernel if it can be used.

    :param x: [N, C, *size].
    :param modulation: scales, then shifts, [N, 2 C]; None: no scale and shift.
    :param activate: whether to apply SiLU.
    :return: the result, of x's shape, and `x`. Use this `x` for a skip connection (see `norm_act`).
    """
    if suits(x, norm, modulation):
        return norm_act(norm, x, modulation, activate)
    if modulation is None:
        h = norm(x)
    else:
        # As a single image with N * C channels, so that the weights and biases of the normalisation can differ from
        # image to image.
        scale, shift = modulation.chunk(2, dim=1)
        n, channels = scale.shape
        weight = norm.weight * (1 + scale)
        bias = norm.bias * (1 + scale) + shift
        stacked = x.reshape(1, n * channels, *x.shape[2:])
        h = F.group_norm(stacked, n * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps)
        h = h.reshape(x.shape)
    return F.silu(h) if activate else h, x


class AttentionBlock(nn.Module):
    """A residual block of self-attention between all positions (Ho et al. 2020, appendix B).

    :raises ValueError: `num_heads` does not divide `channels`.
    """

    def __init__(self, channels: int, num_heads: int = 1, use_checkpoint: bool = False):
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"num_heads {num_heads}: attention on {channels} channels needs a number of heads that "
                "divides them"
            )
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = pointwise_conv_nd(1, channels, 3 * channels)
        self.attention = QKVAttention(num_heads)
        self.proj_out = zero_module(pointwise_conv_nd(1, channels, channels))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:param x: [N, C, *size]; :return: the same shape."""
        if self.use_checkpoint and th.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: th.Tensor) -> th.Tensor:
        layers = (self.norm, self.qkv, self.proj_out, self.attention.num_heads)
        if type(self.attention) is QKVAttention and fused.suits_attention(x, *layers):
            return fused.attention_block(x, *layers)
        h, x = normalize(self.norm, x, activate=False)
        if in_channels_last(h):
            qkv = pointwise_channels_last(h, self.qkv.weight, self.qkv.bias)
            h = self.attention.attend(qkv.permute(0, 2, 3, 1).flatten(1, 2))
            h = h.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
            return x + pointwise_channels_last(h, self.proj_out.weight, self.proj_out.bias)
        h = self.proj_out(self.attention(self.qkv(h.flatten(2))))
        return x + h.reshape(x.shape)


class QKVAttention(nn.Module):
    """Scaled dot-product attention over queries, keys and values stacked by head along the channels."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qkv: th.Tensor) -> th.Tensor:
        """:param qkv: [N, heads * 3 * width, T], each head's queries, keys, values; :return: [N, heads * width, T]."""
        n, channels, length = qkv.shape
        width = channels // (3 * self.num_heads)
        q, k, v = qkv.reshape(n * self.num_heads, 3 * width, length).split(width, dim=1)
        if qkv.dtype == th.float32 and length >= FUSED_ATTENTION_LENGTH:
            # torch's fused attention needs q, k and v as [N, positions, width], contiguous.
            q, k, v = (part.transpose(1, 2).contiguous()[:, None] for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(n, -1, length)
        # The weights are [N, keys, queries], so that neither keys nor values, both [width, T] in memory, have to be
        # transposed. Of the arrangements measured on CPUs, this is the fastest.
        scores = th.bmm((k * (1 / math.sqrt(width))).transpose(1, 2), q)
        return th.bmm(v, scores.softmax(dim=1)).reshape(n, -1, length)

    def attend(self, qkv: th.Tensor) -> th.Tensor:
        """`forward` with the channels last: from [N, T, heads * 3 * width] to [N, T, heads * width]."""
        if attention.suits(qkv, self.num_heads):
            return attention.attention(qkv, self.num_heads)
        return self(qkv.transpose(1, 2)).transpose(1, 2)


class UNetModel(nn.Module):
    """A UNet that makes a prediction from a noisy image and its timestep (Nichol & Dhariwal 2021, appendix A).

    :param in_channels: channels of the input image.
    :param model_channels: channels of the first level; a multiple of 32.
    :param out_channels: channels of the output: those of the image, or twice as many if the variance is learned.
    :param num_res_blocks: residual blocks per level in the downward half; the upward half has one more per level. A
        number, or a list with one number per level.
    :param attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels with attention after each block.
    :param dropout: dropout probability within the residual blocks.
    :param channel_mult: for each level, its channels as a multiple of `model_channels`.
    :param conv_resample: whether downsampling and upsampling contain convolutions.
    :param dims: spatial dimensions of the data: 1, 2 or 3.
    :param num_classes: the number of labels of a class-conditional model, whose `forward` needs labels `y`; None for
        other models.
    :param use_checkpoint: recompute blocks in the backward pass, which takes more time and less memory.
    :param num_heads: attention heads. :param num_heads_upsample: those of the upward half; -1: the same.
    :param use_scale_shift_norm: whether the timestep scales and shifts the normalisation (see `ResBlock`).
    :param ddpm_details: compute like the code of Ho et al. 2020, for weights that come from it. It has other
        frequencies of the timestep embedding, a smaller epsilon in the normalisation, and downsampling that pads only
        at the end. The parameters are the same.
    :param patch_size: P > 1: P x P pixels become the channels of one position before the first layer, and pixels again
        after the last one (space to depth: Shi et al. 2016, arXiv 1609.05158). The levels are then those of an image
        with 1 / P of the side, so most of the cost falls to 1 / P^2.
    :raises ValueError: the channels of a level are not a multiple of 32, or not of the number of heads.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        ddpm_details: bool = False,
        patch_size: int = 1,
    ):
        super().__init__()
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads
        blocks = [num_res_blocks] * len(channel_mult) if isinstance(num_res_blocks, int) else num_res_blocks
        assert len(blocks) == len(channel_mult) and (patch_size == 1 or dims == 2)
        self.patch_size = patch_size
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.num_levels = len(channel_mult)
        self.ddpm_details = ddpm_details
        emb_channels = 4 * model_channels

        def res_block(channels: int, out: int) -> ResBlock:
            return ResBlock(
                channels,
                emb_channels,
                dropout,
                out_channels=out,
                dims=dims,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
            )

        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels), nn.SiLU(), linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        pixels = patch_size**2  # in one position
        first = conv_nd(dims, in_channels * pixels, model_channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        skip_channels = [model_channels]
        channels, factor = model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(blocks[level]):
                layers = [res_block(channels, mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(AttentionBlock(channels, num_heads, use_checkpoint))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                downsample = Downsample(channels, conv_resample, dims, pad_end=ddpm_details)
                self.input_blocks.append(TimestepEmbedSequential(downsample))
                skip_channels.append(channels)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(
            res_block(channels, channels),
            AttentionBlock(channels, num_heads, use_checkpoint),
            res_block(channels, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(blocks[level] + 1):
                layers = [res_block(channels + skip_channels.pop(), mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(AttentionBlock(channels, num_heads_upsample, use_checkpoint))
                if level > 0 and i == blocks[level]:
                    layers.append(Upsample(channels, conv_resample, dims))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            zero_module(conv_nd(dims, channels, out_channels * pixels, 3, padding=1)),
        )
        self._res_blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        for layer, module in enumerate(m for m in self.modules() if isinstance(m, Dropout)):
            module.layer = layer
        if ddpm_details:
            for module in self.modules():
                if isinstance(module, nn.GroupNorm):
                    module.eps = DDPM_EPSILON
        # The compiled kernels need channels_last, and convolutions are faster in it. Without the kernels, PyTorch's
        # normalisation is so slow in channels_last that the contiguous layout is faster.
        self.channels_last = dims == 2 and kernels.generation() is not None
        if self.channels_last:
            self.to(memory_format=th.channels_last)

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """Evaluate the model.

        :param x: noisy images, [N, in_channels, *size].
        :param timesteps: [N], whole numbers or not.
        :param y: labels, int64 [N], if and only if the model is class-conditional.
        :return: [N, out_channels, *size].
        :raises ValueError: labels are missing or not wanted, or there is not one per image.
        """
        *_, h = self._activations(x, timesteps, y)
        norm, _, conv = self.out
        out = conv(normalize(norm, h.to(norm.weight.dtype))[0])
        return out if self.patch_size == 1 else F.pixel_shuffle(out, self.patch_size)

    def get_feature_vectors(
        self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None
    ) -> dict[str, list[th.Tensor] | th.Tensor]:
        """The activations after every block, each [N, channels, *size]: lists "down" and "up", and "middle"."""
        activations = list(self._activations(x, timesteps, y))
        down = len(self.input_blocks)
        return {"down": activations[:down], "middle": activations[down], "up": activations[down + 1 :]}

    def _activations(self, x, timesteps, y):
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("labels y must be given exactly when the model is class-conditional")
        embedding = timestep_embedding(timesteps, self.model_channels, reach_end=self.ddpm_details)
        emb = self.time_embed(embedding.to(self.time_embed[0].weight.dtype))
        if y is not None:
            if y.shape != (x.shape[0],):
                raise ValueError(f"labels y: expected shape [{x.shape[0]}], got {list(y.shape)}")
            emb = emb + self.label_emb(y)
        projected = self._project(emb.to(self.dtype))
        h, skips = x.to(self.dtype), []
        if self.patch_size > 1:
            h = F.pixel_unshuffle(h, self.patch_size)
        if self.channels_last:
            h = h.contiguous(memory_format=th.channels_last)
        for block in self.input_blocks:
            h = block(h, projected)
            skips.append(h)
            yield h
        h = self.middle_block(h, projected)
        yield h
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), projected)
            yield h

    def _project(self, emb: th.Tensor) -> Projected:
        return project(self._res_blocks, emb)

    @property
    def torso(self) -> list[nn.Module]:
        """The parts that may compute in bfloat16: all but the embeddings and the output layer. In bfloat16 these would
        save little time and lose much accuracy."""
        return [self.input_blocks, self.middle_block, self.output_blocks]

    @property
    def dtype(self) -> th.dtype:
        """The floating-point type in which the blocks compute, which is that of their weights."""
        return next(self.input_blocks.parameters()).dtype


class SuperResModel(UNetModel):
    """A UNet with a low-resolution image as a second input, which is upsampled and concatenated with the first (as in
    Saharia et al. 2021, arXiv 2104.07636).

    :param in_channels: channels of each of the two images.
    """

    def __init__(self, in_channels: int, *args, **kwargs):
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        """As `UNetModel.forward`, with `low_res` of shape [N, in_channels, *smaller size]."""
        return super().forward(_stack_low_res(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(self, x, timesteps, low_res=None, **kwargs):
        """As `UNetModel.get_feature_vectors`, with `low_res` of shape [N, in_channels, *smaller size]."""
        return super().get_feature_vectors(_stack_low_res(x, low_res), timesteps, **kwargs)


def _stack_low_res(x: th.Tensor, low_res: th.Tensor) -> th.Tensor:
    upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
    return th.cat([x, upsampled], dim=1)
