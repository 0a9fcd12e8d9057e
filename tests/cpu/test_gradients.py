"""Gradients in several passes, on several cores and in 16 bits: the same as in one, on one core, in 32."""

import threading
import time
from functools import cache, partial

import pytest
import torch as th
from conftest import TINY

from improved_diffusion.cpu.gradients import Gradients, Passes, plan_passes
from improved_diffusion.cpu.workers import Workers
from improved_diffusion.nn import dropout_seeds
from improved_diffusion.script_util import create_model_and_diffusion

BATCH = 8
CASES = {
    "plain": {},
    "embedding_added": {"use_scale_shift_norm": False},
    "learned_sigma": {"learn_sigma": True},
    "classes": {"class_cond": True, "num_classes": 10},
    "dropout": {"dropout": 0.3},
    "checkpointing": {"use_checkpoint": True, "dropout": 0.3},
    "predicts_the_image": {"predict_xstart": True},
    "larger_images": {"image_size": 16, "attention_resolutions": "16"},
}


def gradient(case, precision="fp32", cores=1, part=4, side_by_side=1, before_pass=lambda number: None):
    """The gradient of one batch as a vector, in double precision, and the engine that made it."""
    flags = {**TINY, **CASES[case]}
    th.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    rng = th.Generator().manual_seed(1)
    for p in model.parameters():
        # The last layers start at zero; filling them lets every gradient flow.
        if not p.any():
            p.data.normal_(0, 0.02, generator=rng)
    shape = (BATCH, 3, flags["image_size"], flags["image_size"])
    images, noise = th.randn(shape, generator=rng).clamp(-1, 1), th.randn(shape, generator=rng)
    t = th.randint(0, diffusion.num_timesteps, (BATCH,), generator=rng)
    y = th.arange(BATCH) % 10

    engine = Gradients(model, precision, Workers(side_by_side, cores))

    def compute_pass(number, where):
        before_pass(number)
        kwargs = {"y": y[where]} if flags.get("class_cond") else {}
        with engine.model() as copy, dropout_seeds(range(BATCH)[where]):
            terms = diffusion.training_losses(copy, images[where], t[where], kwargs, noise=noise[where])
            engine.add(terms["loss"].sum() / BATCH, copy, number)

    parts = [slice(start, min(start + part, BATCH)) for start in range(0, BATCH, part)]
    engine.workers.run([partial(compute_pass, *numbered) for numbered in enumerate(parts)])
    norm = engine.norm()
    vector = th.cat([value.flatten() for value in engine.total()]).double()
    assert norm == pytest.approx(vector.norm().item(), rel=1e-6)
    return vector, engine


@cache
def on_one_core(case, precision="fp32", part=4):
    """What other ways to compute the gradient of a batch are compared with, a vector."""
    return gradient(case, precision, part=part)[0]


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.01)])
@pytest.mark.parametrize("case", CASES)
def test_the_number_of_cores_changes_nothing_but_rounding(case, precision, tolerance):
    one = on_one_core(case, precision)
    two, _ = gradient(case, precision, cores=2)
    assert th.equal(gradient(case, precision, cores=2)[0], two)
    assert (two - one).norm() < tolerance * one.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["plain", "dropout", "checkpointing"])
def test_how_many_passes_run_side_by_side_changes_no_bit(case, precision):
    one = on_one_core(case, precision, part=2)
    for side_by_side in (2, 3, 8):
        assert th.equal(gradient(case, precision, part=2, side_by_side=side_by_side)[0], one)


def test_the_order_in_which_passes_end_changes_no_bit():
    """As if another program had taken the cores of the first ones."""
    ended, begun = [threading.Event() for _ in range(4)], []

    def wait_for_the_next(number):
        begun.append(number)
        if number > 0:
            ended[number - 1].set()
        if number < 3:
            assert ended[number].wait(timeout=60)
            time.sleep(0.05 * (3 - number))

    late, _ = gradient("plain", "bf16", part=2, side_by_side=4, before_pass=wait_for_the_next)
    assert sorted(begun) == [0, 1, 2, 3]
    assert th.equal(late, on_one_core("plain", "bf16", part=2))


def test_a_pass_that_fails_is_reported_and_the_next_batch_computed():
    def fail(number):
        if number == 1:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        gradient("plain", part=2, side_by_side=2, before_pass=fail)


@pytest.mark.parametrize(
    ("size", "microbatch", "cores", "expected"),
    [
        (8, 4, 1, (1, 1, 4)),
        (8, 4, 2, (2, 1, 4)),
        (8, 8, 2, (2, 1, 4)),  # rather a smaller pass than a core without one
        (8, 4, 3, (3, 1, 3)),
        (8, 4, 4, (4, 1, 2)),
        (32, 4, 4, (4, 1, 4)),
        (32, 4, 16, (4, 4, 8)),
        (128, 4, 16, (4, 4, 16)),
        (1, 1, 2, (1, 2, 1)),
        (10, 4, 6, (3, 2, 4)),
        (10, 4, 5, (1, 5, 10)),
    ],
)
def test_passes(size, microbatch, cores, expected):
    passes = plan_passes(size, microbatch, cores)
    assert passes == Passes(*expected)
    assert [i for part in passes.slices(size) for i in range(size)[part]] == list(range(size))


@pytest.mark.parametrize("case", CASES)
def test_16_bits_give_the_gradient_of_32(case):
    exact = on_one_core(case)
    rounded, _ = gradient(case, "bf16", cores=2)
    assert not th.equal(rounded, exact)
    assert th.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.999
    assert abs(rounded.norm() / exact.norm() - 1) < 0.01


@pytest.mark.parametrize("part", [1, 3, 4, 8])
def test_where_the_batch_is_cut_changes_nothing(part):
    exact = on_one_core("dropout")
    other, _ = gradient("dropout", part=part)
    assert (other - exact).norm() < 1e-5 * exact.norm()


def test_checkpointing_draws_the_same_masks_again():
    assert th.equal(on_one_core("checkpointing"), on_one_core("dropout"))


def test_the_norm_is_that_of_all_gradients():
    vector, engine = gradient("plain", cores=2)
    assert engine.norm() == pytest.approx(vector.norm().item(), rel=1e-6)
    engine.clear()
    assert not engine.values and all(p.grad is None for p in engine.params)


def test_gradients_are_of_the_weights_as_they_are_now():
    vector, engine = gradient("plain", "bf16")
    with th.no_grad():
        for p, copy in zip(engine.params, engine.copies.in_16_bits):
            p.zero_()
            if copy is not None:
                copy.copy_(p)
    engine.clear()
    with engine.model() as copy:
        engine.add(sum((p.float() ** 2).sum() for p in copy.parameters()), copy, 0)
    assert engine.norm() == 0
