"""The layers that are computed in another way than they are written: the same numbers."""

import pytest
import torch as th
import torch.nn.functional as F

from improved_diffusion.nn import Dropout, conv_nd, dropout_seeds, pointwise_conv_nd
from improved_diffusion.unet import (
    FUSED_ATTENTION_LENGTH,
    QKVAttention,
    ResBlock,
    TimestepEmbedSequential,
    UNetModel,
    project,
)


@pytest.mark.parametrize("dims, size", [(1, (12,)), (2, (3, 4)), (3, (2, 3, 2))])
@pytest.mark.parametrize("dtype, tolerance", [(th.float32, 1e-5), (th.bfloat16, 2e-2)])
def test_pointwise_convolution(dims, size, dtype, tolerance):
    th.manual_seed(0)
    ours, plain = pointwise_conv_nd(dims, 8, 5).to(dtype), conv_nd(dims, 8, 5, 1)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    plain.load_state_dict(ours.state_dict())
    x = th.randn(3, 8, *size, dtype=dtype)
    outputs = []
    for layer in (ours, plain):
        mine = x.to(layer.weight.dtype).requires_grad_()
        y = layer(mine)
        gradients = th.autograd.grad((y.float() ** 2).sum(), [mine, *layer.parameters()])
        outputs.append([y, *gradients])
    for a, b in zip(*outputs):
        assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("length", [16, FUSED_ATTENTION_LENGTH, FUSED_ATTENTION_LENGTH + 7])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_as_it_is_defined(length, heads):
    th.manual_seed(0)
    width = 8
    qkv = th.randn(2, heads * 3 * width, length)
    q, k, v = qkv.double().reshape(2, heads, 3, width, length).unbind(2)
    weights = (th.einsum("nhct,nhcs->nhts", q, k) / width**0.5).softmax(-1)
    expected = th.einsum("nhts,nhcs->nhct", weights, v).reshape(2, heads * width, length)
    assert th.allclose(QKVAttention(heads)(qkv).double(), expected, atol=1e-5)
    rounded = QKVAttention(heads)(qkv.bfloat16()).double()
    assert (rounded - expected).norm() < 0.02 * expected.norm()


def test_dropout_masks_belong_to_the_image():
    layer, x = Dropout(0.5), th.ones(4, 3, 8, 8)
    layer.layer = 7
    with dropout_seeds([1, 2, 3, 4]):
        whole = layer(x)
    with dropout_seeds([3, 4]):
        assert th.equal(layer(x[:2]), whole[2:])
    assert not th.equal(whole[0], whole[1])
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    other = Dropout(0.5)
    with dropout_seeds([1, 2, 3, 4]):
        assert not th.equal(other(x), whole)
    assert not th.equal(layer(x), layer(x))  # without seeds, the global generator
    assert th.equal(layer.eval()(x), x)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_blocks_take_the_embedding_or_what_it_is_projected_to(scale_shift):
    th.manual_seed(0)
    blocks = [ResBlock(32, 24, 0.0, out_channels=out, use_scale_shift_norm=scale_shift) for out in (32, 64)]
    for block in blocks:
        th.nn.init.normal_(block.out_layers[3].weight)
    layers = TimestepEmbedSequential(*blocks)
    x, emb = th.randn(3, 32, 4, 4), th.randn(3, 24)
    expected = blocks[1](blocks[0](x, emb), emb)
    th.testing.assert_close(layers(x, emb), expected)
    projected = project(blocks, emb)
    assert [projected[block].shape[1] for block in blocks] == ([64, 128] if scale_shift else [32, 64])
    th.testing.assert_close(layers(x, projected), expected, rtol=1e-4, atol=1e-4)


def small_unet(patch_size, channels=3, **options):
    th.manual_seed(0)
    arguments = {"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2), **options}
    model = UNetModel(channels, 32, channels, patch_size=patch_size, **arguments)
    th.nn.init.normal_(model.out[2].weight, std=0.1)
    return model.eval()


def test_patches_are_channels_of_a_smaller_image():
    x, t = th.randn(2, 3, 16, 16, generator=th.Generator().manual_seed(1)), th.tensor([3, 700])
    patched, plain = small_unet(2), small_unet(1, channels=12)
    assert {k: v.shape for k, v in patched.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t), 2)
    th.testing.assert_close(patched(x, t), expected)


def test_patches_cost_a_quarter():
    """The convolutions of the first level see a quarter of the positions."""
    x, t = th.zeros(1, 3, 16, 16), th.tensor([0])
    sizes = [small_unet(patch).get_feature_vectors(x, t)["down"][0].shape[2:] for patch in (1, 2)]
    assert sizes == [(16, 16), (8, 8)]


def test_blocks_for_each_level():
    model = small_unet(1, num_res_blocks=(1, 3))
    assert len(model.input_blocks) == 1 + 1 + 1 + 3 and len(model.output_blocks) == 4 + 2
    assert model(th.zeros(1, 3, 8, 8), th.tensor([0])).shape == (1, 3, 8, 8)
