"""Muon: orthogonal updates of matrices, in training exactly resumed."""

import pytest
import torch as th

from improved_diffusion import kernels
from improved_diffusion.cpu.muon import muon, orthogonalize
from improved_diffusion.cpu.optimizer import Optimizer

RNG = th.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (16, 16), (1, 9)])
def test_a_matrix_becomes_nearly_orthogonal_in_its_own_directions(shape):
    # Singular values from 1 down to 0.03, times a factor, which must not matter.
    rank = min(shape)
    left, _, right = th.linalg.svd(th.randn(shape, generator=RNG), full_matrices=False)
    values = 10 ** th.linspace(0, -1.5, rank)
    found = left.T @ orthogonalize(1e-3 * (left * values) @ right) @ right.T
    diagonal = found.diagonal()
    assert diagonal.min() > 0.6 and diagonal.max() < 1.25
    assert (found - diagonal.diag()).abs().max() < 0.05


def test_the_update_is_as_large_as_one_of_adamw():
    param = th.zeros(64, 32, 3, 3)
    gradient = th.randn(param.shape, generator=RNG)
    muon(param, gradient, th.zeros_like(param), lr=1e-2, weight_decay=0.0)
    assert param.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.25)


def test_the_layout_in_memory_does_not_matter():
    start, gradient = th.randn(48, 16, 3, 3, generator=RNG), th.randn(48, 16, 3, 3, generator=RNG)
    results = []
    for layout in (th.contiguous_format, th.channels_last):
        param, momentum = (t.clone(memory_format=layout) for t in (start, th.zeros_like(start)))
        muon(param, gradient.clone(memory_format=layout), momentum, lr=1e-2, weight_decay=0.1)
        results.append(param)
    assert th.allclose(*results, atol=1e-6) and not th.allclose(results[0], start, atol=1e-3)


def test_momentum_and_weight_decay():
    """Against the equations, with an exact orthogonal factor; the iterations come within a third of it."""
    param, momentum = th.eye(8), th.zeros(8, 8)
    expected, buffer = param.clone(), momentum.clone()
    for _ in range(3):
        gradient = th.diag(1 + th.rand(8, generator=RNG))
        buffer = 0.95 * buffer + gradient
        direction = (gradient + 0.95 * buffer).sign()
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * 8**0.5 * direction
        muon(param, gradient.clone(), momentum, lr=0.1, weight_decay=0.5)
        assert th.allclose(momentum, buffer)
    assert th.allclose(param, expected, atol=0.35 * 3 * 0.1 * 0.2 * 8**0.5)
    assert (param - th.diag(param.diagonal())).abs().max() < 1e-5


@pytest.mark.parametrize("setting", ["0", kernels.GENERATIONS[-1]], ids=["without kernels", "with"])
def test_only_the_chosen_parameters_are_updated_so(setting):
    with kernels.switched(setting):
        check_that_only_the_chosen_parameters_are_updated_so()


def check_that_only_the_chosen_parameters_are_updated_so():
    exact = kernels.generation() is None

    def parameters():
        rng = th.Generator().manual_seed(1)
        return [th.nn.Parameter(th.randn(shape, generator=rng)) for shape in ((6, 5), (7,), (4, 3, 3, 3))]

    ours, adamw = parameters(), parameters()
    gradient = [th.randn(p.shape, generator=RNG) for p in ours]
    mean = [p.detach().clone() for p in ours]
    copies = [p.detach().bfloat16() for p in ours]
    optimizer = Optimizer(ours, 1e-2, 0.0, matrices=[0, 2])
    optimizer.step(gradient, [(mean, 0.5)], copies)
    Optimizer(adamw, 1e-2, 0.0).step(gradient)
    assert th.equal(ours[1], adamw[1])
    for i, before in enumerate(parameters()):
        assert th.equal(copies[i], ours[i].bfloat16())
        assert th.allclose(mean[i], (before + ours[i]) / 2, atol=1e-6)
        if i != 1:
            assert not th.allclose(ours[i], adamw[i], atol=1e-3)
            expected = before.detach().clone()
            muon(expected, gradient[i].clone(), th.zeros_like(expected), 1e-2, 0.0)
            assert (
                th.equal(ours[i], expected) if exact else th.allclose(ours[i], expected, rtol=1e-5, atol=1e-6)
            )
    assert [t.numel() for t in optimizer.moments["exp_avg_sq"]] == [0, 7, 0]

    # A state of its own kind is taken over, one of AdamW is not.
    other = Optimizer(parameters(), 1e-2, 0.0, matrices=[0, 2])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(other.params, ours):
        p.data.copy_(q.data)
    optimizer.step(gradient)
    other.step(gradient)
    assert all(map(th.equal, ours, other.params))
    with pytest.raises(ValueError, match="exp_avg_sq of parameter 0 has another shape"):
        other.load_state_dict(Optimizer(parameters(), 1e-2, 0.0).state_dict())
