"""Schedule samplers: unbiased weights, exact resuming, and their messages."""

import json

import numpy as np
import pytest
import torch as th
from scipy import stats

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from improved_diffusion.resample import (
    LogNormalSampler,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)

STEPS = 8


def diffusion(steps=STEPS):
    return GaussianDiffusion(
        betas=get_named_beta_schedule("linear", steps),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )


def warm_resampler(history_per_term=3):
    """A resampler whose every timestep has seen losses about its number plus one."""
    sampler = LossSecondMomentResampler(diffusion(), history_per_term=history_per_term)
    noise = np.random.default_rng(0)
    for _ in range(history_per_term):
        sampler.update_with_all_losses(range(STEPS), 1 + np.arange(STEPS) + 0.1 * noise.random(STEPS))
    return sampler


def test_names():
    assert isinstance(create_named_schedule_sampler("uniform", diffusion()), UniformSampler)
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion())
    assert isinstance(sampler, LossSecondMomentResampler)
    with pytest.raises(
        ValueError, match="schedule sampler 'loss': .*uniform, loss-second-moment or log-normal"
    ):
        create_named_schedule_sampler("loss", diffusion())


def test_uniform_draws_everything_equally_often_with_weight_1():
    t, weights = UniformSampler(diffusion()).sample(8000, "cpu", np.random.default_rng(0))
    assert t.dtype == th.int64 and weights.dtype == th.float32
    assert (weights == 1).all()
    counts = np.bincount(t, minlength=STEPS)
    assert len(counts) == STEPS and (abs(counts - 1000) < 120).all()


def test_second_moment_weights():
    sampler = LossSecondMomentResampler(diffusion(2), history_per_term=2, uniform_prob=0.1)
    sampler.update_with_all_losses([0, 0, 1], [3.0, 1.0, 5.0])
    np.testing.assert_array_equal(sampler.weights(), [1, 1])  # timestep 1 has seen one loss only
    sampler.update_with_all_losses([1], [7.0])
    root_mean_square = np.sqrt([(9 + 1) / 2, (25 + 49) / 2])
    expected = 0.9 * root_mean_square / root_mean_square.sum() + 0.05
    np.testing.assert_allclose(sampler.weights(), expected)
    sampler.update_with_all_losses([0], [2.0])  # pushes out the 3
    assert sampler.weights()[0] == pytest.approx(0.9 * 2.5**0.5 / (2.5**0.5 + 37**0.5) + 0.05)


def test_weights_keep_the_loss_unbiased():
    sampler = warm_resampler()
    loss = 1 + th.arange(STEPS).float() ** 2
    t, weights = sampler.sample(100_000, "cpu", np.random.default_rng(0))
    assert not (weights == 1).all()
    assert (weights * loss[t]).mean().item() == pytest.approx(loss.mean().item(), rel=0.01)
    probabilities = sampler.weights() / sampler.weights().sum()
    assert (probabilities * (1 / (STEPS * probabilities))).sum() == pytest.approx(1)
    np.testing.assert_allclose(np.bincount(t) / len(t), probabilities, atol=0.005)


def test_losses_may_come_as_tensors_and_unequal_in_number():
    by_lists, by_tensors = (LossSecondMomentResampler(diffusion(), history_per_term=2) for _ in range(2))
    for ts, losses in (([0, 1, 1], [1.0, 2.0, 3.0]), ([2], [4.0]), ([], [])):
        by_lists.update_with_all_losses(ts, losses)
        by_tensors.update_with_local_losses(th.tensor(ts, dtype=th.int64), th.tensor(losses))
    assert by_lists.state_dict() == by_tensors.state_dict()
    assert by_lists.state_dict()["counts"] == [1, 2, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "make", [lambda: UniformSampler(diffusion()), warm_resampler, lambda: LogNormalSampler(diffusion(1000))]
)
def test_a_draw_is_a_function_of_generator_and_history(make):
    sampler = make()
    first = sampler.sample(16, "cpu", np.random.default_rng(3))
    th.manual_seed(1)
    second = sampler.sample(16, "cpu", np.random.default_rng(3))
    assert th.equal(first[0], second[0]) and th.equal(first[1], second[1])
    assert not th.equal(first[0], sampler.sample(16, "cpu", np.random.default_rng(4))[0])
    assert not th.equal(sampler.sample(64, "cpu")[0], sampler.sample(64, "cpu")[0])


def test_state_goes_through_json_exactly():
    sampler = warm_resampler()
    restored = LossSecondMomentResampler(diffusion(), history_per_term=3)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for other in (sampler, restored):
        other.update_with_all_losses([5, 5], [0.1, 0.7])
    np.testing.assert_array_equal(restored.weights(), sampler.weights())
    assert restored.state_dict() == sampler.state_dict()
    uniform = UniformSampler(diffusion())
    uniform.load_state_dict(json.loads(json.dumps(uniform.state_dict())))


def test_half_a_history_is_restored_too():
    sampler = LossSecondMomentResampler(diffusion(), history_per_term=3)
    sampler.update_with_all_losses([1, 4], [0.5, 0.25])
    restored = LossSecondMomentResampler(diffusion(), history_per_term=3)
    restored.load_state_dict(sampler.state_dict())
    assert restored.state_dict()["counts"] == [0, 1, 0, 0, 1, 0, 0, 0]


def test_states_that_do_not_fit_are_refused():
    state = warm_resampler().state_dict()
    with pytest.raises(ValueError, match=r"diffusion_steps 9: .* shape \(8, 3\)"):
        LossSecondMomentResampler(diffusion(9), history_per_term=3).load_state_dict(state)
    for sampler in (UniformSampler(diffusion()), LogNormalSampler(diffusion())):
        sampler.load_state_dict({})
        with pytest.raises(ValueError, match="schedule_sampler uniform or log-normal: has no history"):
            sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="schedule_sampler loss-second-moment: needs a history"):
        warm_resampler().load_state_dict({})


# Log-normal


def log_sigma(of):
    return np.log((1 - of.alphas_cumprod) / of.alphas_cumprod) / 2


def test_log_normal_shares_are_those_of_the_normal_distribution():
    of = diffusion(1000)
    logs, shares = log_sigma(of), LogNormalSampler(of, -0.8, 1.1, 0.25).weights()
    assert shares.sum() == pytest.approx(1, abs=1e-12) and (shares >= 0.25 / 1000).all()
    # As a distribution: up to the middle between two timesteps.
    middles = (logs[1:] + logs[:-1]) / 2
    first, last = (2 * logs[i] - middles[i] for i in (0, -1))
    inside = stats.norm.cdf([first, last], -0.8, 1.1)
    normal = (stats.norm.cdf(middles, -0.8, 1.1) - inside[0]) / (inside[1] - inside[0])
    uniform = np.arange(1, 1000) / 1000
    np.testing.assert_allclose(np.cumsum(shares)[:-1], 0.75 * normal + 0.25 * uniform, atol=1e-12)
    # As a density, where neighbours are close.
    density = (shares[1:-1] - 0.25 / 1000) / 0.75 / np.diff(middles) * (inside[1] - inside[0])
    np.testing.assert_allclose(density[200:], stats.norm.pdf(logs[1:-1], -0.8, 1.1)[200:], rtol=2e-3)


def test_log_normal_is_unbiased():
    of = diffusion(1000)
    sampler = LogNormalSampler(of)
    loss = th.from_numpy(1 / (1 + np.exp(log_sigma(of))))
    exact = loss.mean().item()
    # Exactly, over what can be drawn ...
    factors = 1 / (1000 * sampler.weights())
    assert (sampler.weights() * factors * loss.numpy()).sum() == pytest.approx(exact)
    # ... and in the mean of many batches, of any size.
    for size in (8, 7):
        draws = [sampler.sample(size, "cpu", np.random.default_rng(seed)) for seed in range(3000)]
        estimates = np.array([(weights * loss[t]).mean().item() for t, weights in draws])
        assert abs(estimates.mean() - exact) < 4 * estimates.std() / len(draws) ** 0.5
    counts = np.bincount(th.cat([t for t, _ in draws]), minlength=1000).reshape(20, 50).sum(1)
    expected = sampler.weights().reshape(20, 50).sum(1) * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("size", [1, 2, 8, 13, 128])
def test_log_normal_draws_once_from_each_part_of_the_range(size):
    sampler = LogNormalSampler(diffusion(1000))
    upto = np.cumsum(sampler.weights())
    places = []
    for seed in range(20):
        t, weights = sampler.sample(size, "cpu", np.random.default_rng(seed))
        assert t.dtype == th.int64 and t.shape == (size,) and weights.dtype == th.float32
        t = t.numpy()
        np.testing.assert_allclose(weights, 1 / (1000 * sampler.weights()[t]), rtol=1e-6)
        # The range of quantiles that a timestep stands for touches the part that it was drawn from.
        order = t.argsort()
        low, high = (upto - sampler.weights())[t][order], upto[t][order]
        assert (low <= (np.arange(size) + 1) / size + 1e-12).all()
        assert (high >= np.arange(size) / size - 1e-12).all()
        places.append(high)
    assert size > 100 or np.std(places, axis=0).min() > 0  # within the parts, it is random


@pytest.mark.parametrize("size, part", [(8, 4), (16, 4), (32, 8), (24, 6)])
def test_log_normal_covers_the_range_in_every_microbatch(size, part):
    sampler = LogNormalSampler(diffusion(1000))
    upto = np.cumsum(sampler.weights())
    for seed in range(5):
        t, _ = sampler.sample(size, "cpu", np.random.default_rng(seed))
        for some in t.view(-1, part).numpy():
            found = np.sort(upto[some])
            assert (np.diff([0, *found, 1]) <= 3 / part).all()
            assert found[0] <= 0.5 and found[-1] >= 0.5


def test_log_normal_of_short_schedules():
    for steps in (1, 2, 3):
        t, weights = LogNormalSampler(diffusion(steps)).sample(16, "cpu", np.random.default_rng(0))
        assert t.max() < steps and weights.isfinite().all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sigma_std": 0.0}, "std 0.0"),
        ({"sigma_mean": float("nan")}, "mean nan"),
        ({"uniform_share": 1.5}, "uniform_share 1.5"),
        ({"sigma_mean": -50.0}, "mean -50.0.*no timestep has such noise.*from -"),
        ({"sigma_mean": 80.0}, "mean 80.0.*no timestep has such noise"),
    ],
)
def test_log_normal_names_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        create_named_schedule_sampler("log-normal", diffusion(), **options)
