"""Threads with a core each, and the copies of a model that they share the weights of."""

import threading

import pytest
import torch as th
from conftest import TINY

from improved_diffusion.cpu.workers import ModelCopies, Workers
from improved_diffusion.script_util import create_model_and_diffusion


def test_results_come_in_order_from_threads_with_one_core():
    threads = th.get_num_threads()
    workers = Workers(3)
    barrier = threading.Barrier(3, timeout=20)  # passed only when three tasks run at the same time

    def task(number):
        barrier.wait()
        return number, th.get_num_threads()

    results = workers.run([lambda n=n: task(n) for n in range(6)])
    assert results == [(n, 1) for n in range(6)]
    assert th.get_num_threads() == threads


def test_an_error_waits_for_the_other_tasks():
    done = []

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Workers(2).run([fail, lambda: done.append(1), lambda: done.append(2)])
    assert sorted(done) == [1, 2]


def copies(precision, count=2, weights=None):
    model, _ = create_model_and_diffusion(**TINY)
    return model, ModelCopies(model, count, precision, weights)


def test_copies_in_32_bits_are_the_weights_themselves():
    model, made = copies("fp32")
    for copy in made.models:
        assert copy is not model
        for p, q in zip(model.parameters(), copy.parameters()):
            assert p is not q and p.data_ptr() == q.data_ptr()


def test_copies_in_16_bits_share_a_torso_that_is_updated():
    model, made = copies("bf16")
    one, two = made.models
    assert (
        one.dtype == th.bfloat16 and one.time_embed[0].weight.dtype == one.out[2].weight.dtype == th.float32
    )
    for p, q, r in zip(model.parameters(), one.parameters(), two.parameters()):
        assert q.data_ptr() == r.data_ptr() and th.equal(q, p.to(q.dtype))
    with th.no_grad():
        for p in model.parameters():
            p.add_(1)
    followers = [(copy, p) for copy, p in zip(made.in_16_bits, model.parameters()) if copy is not None]
    assert {id(p) for _, p in followers} == {id(p) for part in model.torso for p in part.parameters()}
    for copy, p in followers:
        copy.copy_(p.detach())
    for p, q in zip(model.parameters(), one.parameters()):
        assert th.equal(q, p.to(q.dtype))


def test_copies_of_other_weights_leave_the_model_alone():
    model, made = copies("fp32", 1, [th.zeros_like(p) for p in copies("fp32")[0].parameters()])
    assert not any(p.any() for p in made.models[0].parameters())
    assert any(p.any() for p in model.parameters())
