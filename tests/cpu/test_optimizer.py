"""AdamW is PyTorch's: to the last bit without compiled kernels, and with them up to the order of its operations."""

import contextlib

import pytest
import torch as th

from improved_diffusion import kernels
from improved_diffusion.cpu.optimizer import BLOCK, Optimizer, blocks_of
from improved_diffusion.nn import update_ema

SHAPES = [(BLOCK + 3,), (5,), (), (300, 400), (2, 3, 4), (7,)]


@pytest.fixture(params=["with kernels", "without"], autouse=True)
def same(request):
    """What two tensors that should be the same have to pass."""
    with kernels.switched("0") if request.param == "without" else contextlib.nullcontext():
        exact = kernels.generation() is None
        yield th.equal if exact else lambda a, b: th.allclose(a, b, rtol=1e-5, atol=1e-6)


def parameters():
    rng = th.Generator().manual_seed(0)
    return [th.nn.Parameter(th.randn(shape, generator=rng)) for shape in SHAPES]


def train(params, step, steps=5, start=0):
    for number in range(start, start + steps):
        rng = th.Generator().manual_seed(100 + number)
        for p in params:
            p.grad = th.randn(p.shape, generator=rng)
        step(number)


def test_blocks_are_complete():
    sizes = [3 * BLOCK, 10, BLOCK, 7, BLOCK // 2, BLOCK // 2, 2 * BLOCK, 0]
    blocks = blocks_of([th.empty(size) for size in sizes])
    assert sorted(i for block in blocks for i in block) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in block) >= BLOCK for block in blocks[:-1])
    assert len(blocks) == 5


def test_it_is_adamw_with_moving_averages(same):
    expected, ours = parameters(), parameters()
    adamw = th.optim.AdamW(expected, lr=1e-2, weight_decay=0.1, fused=True)
    optimizer = Optimizer(ours, 1e-2, 0.1)
    averages = [p.detach().clone() for p in ours]
    expected_averages = [p.detach().clone() for p in ours]

    def reference(number):
        adamw.param_groups[0]["lr"] = 1e-2 / (1 + number)
        adamw.step()
        update_ema(expected_averages, expected, 0.5)

    def step(number):
        optimizer.lr = 1e-2 / (1 + number)
        optimizer.step([p.grad for p in ours], [(averages, 0.5)])

    train(expected, reference)
    train(ours, step)
    assert all(map(same, ours, expected))
    assert all(map(same, averages, expected_averages))


def test_states_go_from_torch_and_to_torch(same):
    theirs, ours = parameters(), parameters()
    adamw = th.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, fused=True)
    train(theirs, lambda _: adamw.step())
    optimizer = Optimizer(ours, 1e-2, 0.1)
    optimizer.load_state_dict(adamw.state_dict())
    for p, q in zip(ours, theirs):
        p.data.copy_(q.data)
    train(theirs, lambda _: adamw.step(), start=5)
    train(ours, lambda _: optimizer.step([p.grad for p in ours], []), start=5)
    assert all(map(same, ours, theirs))

    back = th.optim.AdamW(ours, lr=5.0)
    back.load_state_dict(optimizer.state_dict())
    assert back.param_groups[0]["lr"] == 1e-2 and back.param_groups[0]["weight_decay"] == 0.1
    train(theirs, lambda _: adamw.step(), start=10)
    train(ours, lambda _: back.step(), start=10)
    assert all(map(same, ours, theirs))


def test_copies_follow_and_the_gradient_is_scaled(same):
    ours, halved = parameters(), parameters()
    copies = [p.detach().bfloat16() if i % 2 else None for i, p in enumerate(ours)]
    optimizer, other = Optimizer(ours, 1e-2, 0.1), Optimizer(halved, 1e-2, 0.1)
    train(ours, lambda _: optimizer.step([p.grad for p in ours], copies=copies, factor=0.5))
    train(halved, lambda _: other.step([0.5 * p.grad for p in halved]))
    assert all(map(same, ours, halved))
    for copy, p in zip(copies, ours):
        assert copy is None or th.equal(copy, p.bfloat16())


def test_settings_of_a_state_do_not_count():
    state = Optimizer(parameters(), 1e-2, 0.1).state_dict()
    optimizer = Optimizer(parameters(), 3e-4, 0.0)
    optimizer.load_state_dict(state)
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.0)


def test_states_of_other_parameters_are_refused():
    optimizer = Optimizer(parameters(), 1e-2, 0.1)
    fewer = Optimizer(parameters()[:3], 1e-2, 0.1).state_dict()
    with pytest.raises(ValueError, match="of 3 parameters, not 6"):
        optimizer.load_state_dict(fewer)
    others = Optimizer(parameters()[::-1], 1e-2, 0.1).state_dict()
    with pytest.raises(ValueError, match="exp_avg of parameter 0 has another shape"):
        optimizer.load_state_dict(others)
