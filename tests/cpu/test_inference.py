"""Evaluating a model fast: the same output as the model's own, in any batch."""

import pytest
import torch as th
from conftest import TINY

from improved_diffusion.cpu.inference import fast_model
from improved_diffusion.script_util import create_model_and_diffusion, sr_create_model_and_diffusion


def create(**flags):
    th.manual_seed(0)
    model, _ = create_model_and_diffusion(**{**TINY, **flags})
    for p in model.parameters():
        p.data.normal_(0, 0.05) if p.dim() > 1 else None
    return model


def inputs(count=13):
    rng = th.Generator().manual_seed(1)
    size = TINY["image_size"]
    return th.randn(count, 3, size, size, generator=rng), th.randint(0, 1000, (count,), generator=rng).float()


TOLERANCES = {"fp32": 1e-5, "bf16": 0.03}  # of the output's norm


def close(found, expected, precision):
    return (found - expected).norm() < TOLERANCES[precision] * expected.norm()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_output_is_the_models(precision, workers):
    model, (x, t) = create(dropout=0.5), inputs()
    fast = fast_model(model.train(), precision, workers)(x, t)
    with th.no_grad():
        expected = model.eval()(x, t)
    assert fast.dtype == th.float32 and not fast.requires_grad
    assert close(fast, expected, precision)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_an_image_comes_out_the_same_in_any_batch(precision):
    """Up to rounding: some processors compute batches of other sizes by other algorithms."""
    model, (x, t) = create(), inputs()
    whole = fast_model(model, precision, 1)(x, t)
    for workers in (1, 2, 3):
        fast = fast_model(model, precision, workers)
        for size in (1, 2, 3, 4, 5, 9, 13):
            parts = th.cat([fast(x[i : i + size], t[i : i + size]) for i in range(0, len(x), size)])
            for found, expected in zip(parts, whole, strict=True):
                assert close(found, expected, precision), (workers, size)


@pytest.mark.parametrize(
    "count, expected", [(1, [4]), (3, [4]), (4, [4]), (7, [7]), (8, [4, 4]), (9, [4, 5])]
)
def test_no_slice_is_smaller_than_four_images(count, expected):
    x, t = inputs(count)
    seen = []

    class Double(th.nn.Module):
        def forward(self, x, timesteps):
            seen.append(len(x))
            return 2 * x

    assert th.equal(fast_model(Double(), "fp32", 2)(x, t), 2 * x)
    assert sorted(seen) == expected


def test_weights_can_be_others_than_the_models():
    model, (x, t) = create(), inputs(4)
    zeros = [th.zeros_like(p) for p in model.parameters()]
    assert not fast_model(model, "fp32", 1, zeros)(x, t).any()
    same = [p.detach().clone() for p in model.parameters()]
    expected = fast_model(model, "bf16", 2)(x, t)
    with th.no_grad():
        for p in model.parameters():
            p.zero_()
    assert th.equal(fast_model(model, "bf16", 2, same)(x, t), expected)


def test_other_arguments_are_split_alike():
    model = create(class_cond=True, num_classes=10)
    x, t = inputs(9)
    y = th.arange(9)
    fast = fast_model(model, "fp32", 2)
    with th.no_grad():
        expected = model.eval()(x, t, y=y)
    assert th.allclose(fast(x, t, y=y), expected, atol=1e-4)
    flags = {k: v for k, v in TINY.items() if k not in ("image_size", "class_cond", "num_classes")}
    model, _ = sr_create_model_and_diffusion(**flags, large_size=8, small_size=4)
    low_res = th.randn(9, 3, 4, 4, generator=th.Generator().manual_seed(2))
    with th.no_grad():
        expected = model.eval()(x, t, low_res=low_res)
    assert th.allclose(fast_model(model, "fp32", 2)(x, t, low_res=low_res), expected, atol=1e-4)
