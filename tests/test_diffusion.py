"""The diffusion process against theory, its samplers on a Gaussian whose answer is known, and respacing."""

import math

import numpy as np
import pytest
import torch as th
from diffusions import build
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from improved_diffusion import losses, weighting
from improved_diffusion.gaussian_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from improved_diffusion.resample import LogNormalSampler
from improved_diffusion.respace import space_timesteps

DATA_MEAN, DATA_STD = 0.3, 0.5


def gaussian_model(steps, schedule="linear", mean=ModelMeanType.EPSILON, data_std=DATA_STD, sigma_data=0.5):
    """The perfect model, in closed form, of independent pixels from N(DATA_MEAN, data_std ** 2)."""
    original = build(steps, schedule=schedule)
    alpha_bar = th.from_numpy(original.alphas_cumprod)

    def model(x, t):
        share = alpha_bar[t].view(-1, *[1] * (x.dim() - 1))
        if mean is ModelMeanType.EDM:  # it is given x at variance 1
            x = x.double() * (share * sigma_data**2 + 1 - share).sqrt()
        distance = x.double() - share.sqrt() * DATA_MEAN
        variance = share * data_std**2 + 1 - share
        x_start = DATA_MEAN + share.sqrt() * data_std**2 * distance / variance
        if mean is ModelMeanType.EPSILON:
            return (1 - share).sqrt() * distance / variance
        if mean is ModelMeanType.START_X:
            return x_start
        if mean is ModelMeanType.VELOCITY:  # Salimans & Ho 2022: v = alpha eps - sigma x_start
            return (1 - share).sqrt() * (share.sqrt() * distance / variance - x_start)
        if mean is ModelMeanType.EDM:  # Karras et al. 2022, eq. 7 and table 1, on their scale
            noisy, sigma = x / share.sqrt(), (1 / share - 1).sqrt()
            total = sigma**2 + sigma_data**2
            return (x_start - sigma_data**2 / total * noisy) * total.sqrt() / (sigma * sigma_data)
        return original.q_posterior_mean_variance(x_start, x, t)[0]

    return model


def toy_model(var=ModelVarType.FIXED_SMALL):
    def model(x, t):
        values = 0.3 * x + 0.1 * th.sin(0.01 * t.float()).view(-1, 1, 1, 1)
        learned = var in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        return th.cat([values, th.tanh(values) - 1], dim=1) if learned else values

    return model


def images(count=4, size=4, seed=0):
    return th.randn(count, 3, size, size, generator=th.Generator().manual_seed(seed)).tanh()


class Streams:
    """A `randn_like` in which every image has a random stream of its own."""

    def __init__(self, seeds):
        self.generators = [th.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x):
        return th.stack([th.randn(x.shape[1:], generator=generator) for generator in self.generators])


# Schedules


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 19, 20, 21, 100])
def test_schedules_of_any_length_end_in_noise(schedule, steps):
    betas = get_named_beta_schedule(schedule, steps)
    assert betas.shape == (steps,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas <= 0.999).all()
    assert np.prod(1 - betas) < 2e-3


def test_schedule_errors():
    with pytest.raises(ValueError, match="schedule 'sqrt': use linear or cosine"):
        get_named_beta_schedule("sqrt", 10)
    with pytest.raises(ValueError, match="num_diffusion_timesteps 0"):
        get_named_beta_schedule("linear", 0)


def test_betas_for_alpha_bar_follow_the_function_up_to_the_limit():
    betas = betas_for_alpha_bar(10, lambda time: 1 - time, max_beta=0.9)
    np.testing.assert_allclose(np.cumprod(1 - betas)[:9], 1 - np.arange(1, 10) / 10)
    assert betas[-1] == 0.9


# The forward process


def test_posterior_is_bayes_rule():
    diffusion = build(50)
    i, x_start, x_t = 20, 0.4, -0.7
    alpha, before = 1 - diffusion.betas[i], diffusion.alphas_cumprod[i - 1]
    grid = np.linspace(-6, 6, 20001)
    density = stats.norm.pdf(grid, math.sqrt(before) * x_start, math.sqrt(1 - before))
    density *= stats.norm.pdf(x_t, math.sqrt(alpha) * grid, math.sqrt(1 - alpha))
    density /= density.sum()
    mean = (grid * density).sum()
    variance = ((grid - mean) ** 2 * density).sum()

    t = th.tensor([i])
    found = diffusion.q_posterior_mean_variance(th.full((1, 1), x_start), th.full((1, 1), x_t), t)
    assert found[0].item() == pytest.approx(mean, rel=1e-4)
    assert found[1].item() == pytest.approx(variance, rel=1e-4)
    assert found[2].item() == pytest.approx(math.log(variance), rel=1e-4)


def test_q_sample_has_the_moments_of_q():
    diffusion, x_start, t = build(100), th.full((2, 40000), 0.5), th.tensor([3, 60])
    th.manual_seed(0)
    x_t = diffusion.q_sample(x_start, t)
    mean, variance, log_variance = diffusion.q_mean_variance(x_start, t)
    th.testing.assert_close(x_t.mean(dim=1), mean[:, 0], atol=0.02, rtol=0)
    th.testing.assert_close(x_t.var(dim=1), variance[:, 0], atol=0, rtol=0.03)
    th.testing.assert_close(log_variance.exp(), variance)


@pytest.mark.parametrize("mean", ModelMeanType)
def test_every_mean_type_describes_the_same_step(mean):
    steps = 50
    x, t = images(), th.tensor([1, 10, 30, 49])
    found = build(steps, mean=mean).p_mean_variance(
        gaussian_model(steps, mean=mean), x, t, clip_denoised=False
    )
    expected = build(steps).p_mean_variance(gaussian_model(steps), x, t, clip_denoised=False)
    for key, value in expected.items():
        th.testing.assert_close(found[key], value, atol=2e-4, rtol=1e-4)


def test_learned_range_reaches_from_the_small_to_the_large_variance():
    x, t = images(2), th.tensor([0, 30])
    for value, var in ((-1.0, ModelVarType.FIXED_SMALL), (1.0, ModelVarType.FIXED_LARGE)):
        found = build(50, var=ModelVarType.LEARNED_RANGE).p_mean_variance(
            lambda x, t, value=value: th.cat([x, th.full_like(x, value)], dim=1), x, t
        )["log_variance"]
        expected = build(50, var=var).p_mean_variance(lambda x, t: x, x, t)["log_variance"]
        th.testing.assert_close(found[1], expected[1])


def test_denoised_fn_comes_before_clipping():
    step = build(10).p_mean_variance(
        lambda x, t: x, images(2), th.tensor([2, 5]), denoised_fn=lambda x: th.full_like(x, 7.0)
    )
    assert (step["pred_xstart"] == 1).all()


# Samplers, on data whose perfect model is known


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("var", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
@pytest.mark.parametrize("mean", ModelMeanType)
def test_ancestral_sampling_reaches_the_data_distribution(schedule, var, mean):
    th.manual_seed(0)
    diffusion, model = build(300, schedule=schedule, var=var, mean=mean), gaussian_model(300, schedule, mean)
    samples = diffusion.p_sample_loop(model, (5000, 8), clip_denoised=False)
    assert samples.mean().item() == pytest.approx(DATA_MEAN, abs=0.015)
    assert samples.std().item() == pytest.approx(DATA_STD, rel=0.04)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "respacing, mean",
    [
        (None, ModelMeanType.EPSILON),
        ("300", ModelMeanType.EPSILON),
        ("ddim300", ModelMeanType.VELOCITY),
        ("300", ModelMeanType.EDM),
    ],
)
def test_ddim_reaches_the_data_distribution(eta, respacing, mean):
    th.manual_seed(0)
    steps = 600 if respacing else 300
    diffusion, model = build(steps, respacing=respacing, mean=mean), gaussian_model(steps, mean=mean)
    samples = diffusion.ddim_sample_loop(model, (5000, 8), clip_denoised=False, eta=eta)
    assert samples.mean().item() == pytest.approx(DATA_MEAN, abs=0.015)
    assert samples.std().item() == pytest.approx(DATA_STD, rel=0.04)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_with_eta_1_is_ancestral_sampling(schedule):
    diffusion, model = build(100, schedule=schedule), toy_model()
    shape, seeds = (3, 3, 4, 4), (1, 2, 3)
    ancestral = diffusion.p_sample_loop(model, shape, randn_like=Streams(seeds))
    ddim = diffusion.ddim_sample_loop(model, shape, eta=1.0, randn_like=Streams(seeds))
    th.testing.assert_close(ddim, ancestral, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mean", [ModelMeanType.EPSILON, ModelMeanType.VELOCITY, ModelMeanType.EDM])
def test_ddim_reverse_then_forward_returns_the_image(mean):
    x_start, errors = images(), []
    for steps in (200, 400):
        diffusion, model = build(steps, mean=mean), gaussian_model(steps, mean=mean)
        noise = diffusion.ddim_reverse_loop(model, x_start, clip_denoised=False)
        assert (noise - x_start).abs().mean() > 0.3  # it is another picture in between
        again = diffusion.ddim_sample_loop(model, x_start.shape, noise=noise, clip_denoised=False)
        errors.append((again - x_start).abs().max().item())
    assert errors[0] < 0.05
    assert errors[1] < 0.6 * errors[0]  # first order: half the step, half the error


def test_one_reverse_step_is_undone_by_one_forward_step():
    diffusion, constant = build(100), images(seed=5)

    def model(x, t):
        return constant

    x = images()
    up = diffusion.ddim_reverse_sample(model, x, th.full((4,), 30), clip_denoised=False)["sample"]
    down = diffusion.ddim_sample(model, up, th.full((4,), 31), clip_denoised=False)["sample"]
    th.testing.assert_close(down, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_equation_12_of_the_paper(eta):
    diffusion, x, i = build(100), images(), 30
    now, before = diffusion.alphas_cumprod[[i, i - 1]]
    sigma = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)  # eq. 16
    step = diffusion.ddim_sample(toy_model(), x, th.full((4,), i), eta=eta, randn_like=Streams(range(4)))
    x_start = step["pred_xstart"]
    eps = (x - math.sqrt(now) * x_start) / math.sqrt(1 - now)
    expected = math.sqrt(before) * x_start + math.sqrt(1 - before - sigma**2) * eps
    th.testing.assert_close(step["sample"], expected + sigma * Streams(range(4))(x), atol=1e-5, rtol=1e-5)


def test_ddim_reverse_loop_ends_at_the_level_where_sampling_starts():
    seen = []

    def model(x, t):
        seen.append(t[0].item())
        return 0.1 * x

    build(5).ddim_reverse_loop(model, images())
    assert seen == [0, 1, 2, 3]
    assert th.equal(build(1).ddim_reverse_loop(model, images()), images())


def test_eta_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="eta is 1.5"):
        build(10).ddim_sample(toy_model(), images(), th.full((4,), 3), eta=1.5)


# Sampling loops


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_an_image_depends_on_its_own_random_stream_only(loop):
    diffusion, options = build(10), {"eta": 0.7} if loop.startswith("ddim") else {}
    alone = getattr(diffusion, loop)(toy_model(), (1, 3, 4, 4), randn_like=Streams([7]), **options)
    among = getattr(diffusion, loop)(toy_model(), (3, 3, 4, 4), randn_like=Streams([1, 7, 3]), **options)
    th.testing.assert_close(among[1], alone[0], rtol=0, atol=1e-6)
    assert not th.allclose(among[0], among[1])


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loop_returns_the_last_of_the_progressive_steps(loop):
    diffusion, shape = build(6), (2, 3, 4, 4)
    steps = list(getattr(diffusion, loop + "_progressive")(toy_model(), shape, randn_like=Streams([1, 2])))
    assert len(steps) == 6
    last = getattr(diffusion, loop)(toy_model(), shape, randn_like=Streams([1, 2]))
    assert th.equal(steps[-1]["sample"], last)
    assert th.equal(steps[-1]["sample"], steps[-1]["pred_xstart"])  # nothing is random at t = 0


def test_loops_track_no_gradients_and_leave_the_callers_mode_alone():
    layer = th.nn.Conv2d(3, 3, 1)

    class Model(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, t):
            assert not th.is_grad_enabled()
            return self.layer(x)

    for step in build(3).p_sample_loop_progressive(Model(), (2, 3, 4, 4)):
        assert th.is_grad_enabled()
        assert not step["sample"].requires_grad


def test_loops_start_from_the_noise_given_and_pass_arguments_on():
    noise, seen = images(2), []

    def model(x, t, y):
        seen.append((x, t, y))
        return 0.1 * x

    build(4).ddim_sample_loop(model, noise.shape, noise=noise, model_kwargs={"y": "label"})
    assert th.equal(seen[0][0], noise)
    assert [t.tolist() for _, t, _ in seen] == [[3, 3], [2, 2], [1, 1], [0, 0]]
    assert {y for _, _, y in seen} == {"label"}


def test_progress_bar_only_on_request(capfd):
    build(3).p_sample_loop(toy_model(), (1, 3, 4, 4))
    assert capfd.readouterr().err == ""
    build(3).p_sample_loop(toy_model(), (1, 3, 4, 4), progress=True)
    assert "3/3" in capfd.readouterr().err


def test_a_16_bit_model_is_sampled_in_float32():
    samples = build(5).p_sample_loop(lambda x, t: (0.3 * x).bfloat16(), (2, 3, 4, 4))
    assert samples.dtype == th.float32 and samples.isfinite().all()


# Losses and the bound


@pytest.mark.parametrize("loss", LossType)
@pytest.mark.parametrize("var", ModelVarType)
@pytest.mark.parametrize("mean", ModelMeanType)
@pytest.mark.parametrize("steps", [1, 2, 10, 19, 100])
def test_every_combination_trains_samples_and_scores(steps, mean, var, loss):
    diffusion = build(steps, mean=mean, var=var, loss=loss)
    t = th.tensor([0, steps // 2, steps - 1, steps // 3])
    terms = diffusion.training_losses(toy_model(var), images(), t)
    learned = var in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
    assert terms.keys() == ({"loss"} if loss.is_vb() else {"loss", "mse"} | ({"vb"} if learned else set()))
    for value in terms.values():
        assert value.shape == (4,) and value.isfinite().all()
    if steps <= 10:
        for sampled in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
            assert sampled(toy_model(var), (2, 3, 4, 4)).isfinite().all()
        assert diffusion.ddim_reverse_loop(toy_model(var), images()).isfinite().all()
        assert diffusion.calc_bpd_loop(toy_model(var), images())["total_bpd"].isfinite().all()


@pytest.mark.parametrize("mean", [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.PREVIOUS_X])
def test_the_perfect_prediction_has_no_squared_error(mean):
    diffusion, x_start, noise, t = build(100, mean=mean), images(), images(seed=1), th.tensor([0, 5, 50, 99])
    x_t = diffusion.q_sample(x_start, t, noise)
    answers = {
        ModelMeanType.EPSILON: noise,
        ModelMeanType.START_X: x_start,
        ModelMeanType.PREVIOUS_X: diffusion.q_posterior_mean_variance(x_start, x_t, t)[0],
    }
    terms = diffusion.training_losses(lambda x, t: answers[mean], x_start, t, noise=noise)
    assert (terms["mse"] == 0).all()


@pytest.mark.parametrize("mean", ModelMeanType)
def test_no_prediction_errs_less_than_the_perfect_model(mean):
    th.manual_seed(0)
    diffusion, model = build(100, mean=mean), gaussian_model(100, mean=mean)
    t = th.tensor([1, 10, 50, 98])
    x_start, noise = DATA_MEAN + DATA_STD * th.randn(4, 100_000), th.randn(4, 100_000)

    def mse(change):
        return diffusion.training_losses(lambda x, t: change(model(x, t), x), x_start, t, noise=noise)["mse"]

    best = mse(lambda prediction, x: prediction)
    # The error of the mean given x is correlated with nothing that x determines: a constant, it, x.
    for change in (lambda p, x, by: p + by, lambda p, x, by: p + by * p, lambda p, x, by: p + by * x):
        more, less = (mse(lambda p, x, by=by, change=change: change(p, x, by)) for by in (1, -1))
        size = ((more + less) / 2 - best).clamp(min=1e-12)
        assert ((more - less).abs() / 4 / (size * best).sqrt() < 0.015).all()


def test_the_target_of_edm_has_variance_one_and_velocity_is_edm_with_sigma_data_1():
    th.manual_seed(0)
    t, noise = th.tensor([0, 30, 60, 99]), th.randn(4, 100_000)
    x_start = DATA_STD * th.randn(4, 100_000)
    edm = build(100, mean=ModelMeanType.EDM, sigma_data=DATA_STD)
    inputs = []
    size = edm.training_losses(lambda x, t: inputs.append(x) or 0 * x, x_start, t, noise=noise)["mse"]
    th.testing.assert_close(size, th.ones(4), atol=0.02, rtol=0)
    th.testing.assert_close(inputs[0].var(dim=1), th.ones(4), atol=0.02, rtol=0)

    velocity, as_edm = (
        build(100, mean=ModelMeanType.VELOCITY),
        build(100, mean=ModelMeanType.EDM, sigma_data=1.0),
    )
    steps = (
        diffusion.p_mean_variance(lambda x, t, sign=sign: sign * th.sin(x), noise, t, clip_denoised=False)
        for diffusion, sign in ((velocity, 1), (as_edm, -1))
    )
    th.testing.assert_close(next(steps), next(steps))


ALPHA_BAR = np.cumprod(1 - get_named_beta_schedule("linear", 100))
SNR = ALPHA_BAR / (1 - ALPHA_BAR)
MIN_SNR_FACTORS = {  # Hang et al. 2023, section 3.3 and its table of predictions
    ModelMeanType.EPSILON: np.minimum(SNR, 5) / SNR,
    ModelMeanType.START_X: np.minimum(SNR, 5),
    ModelMeanType.VELOCITY: np.minimum(SNR, 5) / (SNR + 1),
    ModelMeanType.EDM: np.minimum(SNR, 5) * 0.5**2 / (1 + 0.5**2 * SNR),  # times c_out^2
}


@pytest.mark.parametrize("mean", MIN_SNR_FACTORS)
@pytest.mark.parametrize("var", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE])
def test_min_snr_weights(mean, var):
    t, noise = th.tensor([0, 20, 50, 99]), images(seed=1)
    plain, weighted = (
        build(100, mean=mean, var=var, loss_weighting=weights).training_losses(
            toy_model(var), images(), t, noise=noise
        )
        for weights in (None, weighting.min_snr)
    )
    assert th.equal(weighted["mse"], plain["mse"])
    expected = plain["mse"] * th.from_numpy(MIN_SNR_FACTORS[mean][t]).float() + plain.get("vb", 0)
    th.testing.assert_close(weighted["loss"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mean", MIN_SNR_FACTORS)
def test_edm_weights_are_one_on_the_error_of_f(mean):
    """In whatever a model predicts, its weighted loss is that of the F which says the same."""
    shares = weighting.log_normal_shares(SNR**-0.5, -1.0, 1.5, 0.2)
    diffusion, edm = (
        build(100, mean=mean, loss_weighting=lambda sigma: weighting.edm(sigma, 0.5, shares)),
        build(100, mean=ModelMeanType.EDM),
    )
    t, noise, x_start = th.tensor([0, 20, 50, 99]), images(seed=1), images()
    sampler = LogNormalSampler(diffusion, -1.0, 1.5, 0.2)
    np.testing.assert_allclose(sampler.weights(), shares, rtol=1e-9)
    factors = th.from_numpy(1 / (100 * shares[t])).float()  # those of the sampler

    guess = {}

    def model(x, told):
        guess["x_start"] = diffusion.predicted_x_start(0.3 * x, x_t, t, clip_denoised=False)
        return 0.3 * x

    x_t = diffusion.q_sample(x_start, t, noise)
    loss = diffusion.training_losses(model, x_start, t, noise=noise)["loss"]
    root = np.sqrt(1 / SNR[t] + 0.25)  # Karras et al. 2022, table 1
    c_skip, c_out = 0.25 / root**2, 0.5 * SNR[t] ** -0.5 / root
    c_skip, c_out, alpha = (
        th.from_numpy(c).view(-1, 1, 1, 1) for c in (c_skip, c_out, np.sqrt(ALPHA_BAR[t]))
    )
    answer = ((guess["x_start"] - c_skip * x_t / alpha) / c_out).float()
    error_of_f = edm.training_losses(lambda x, told: answer, x_start, t, noise=noise)["mse"]
    th.testing.assert_close(loss * factors, error_of_f, rtol=2e-3, atol=1e-5)


def test_a_weighting_needs_a_squared_error():
    with pytest.raises(ValueError, match="loss_weighting: .*use_kl"):
        build(10, loss=LossType.KL, loss_weighting=weighting.min_snr)


def test_rescaling_multiplies_the_bound():
    t, noise, var = th.tensor([0, 5, 20, 39]), images(seed=1), ModelVarType.LEARNED_RANGE
    terms = {
        loss: build(40, var=var, loss=loss).training_losses(toy_model(var), images(), t, noise=noise)
        for loss in LossType
    }
    th.testing.assert_close(terms[LossType.RESCALED_KL]["loss"], 40 * terms[LossType.KL]["loss"])
    th.testing.assert_close(terms[LossType.RESCALED_MSE]["vb"], 0.04 * terms[LossType.MSE]["vb"])
    th.testing.assert_close(terms[LossType.MSE]["vb"], terms[LossType.KL]["loss"])
    for loss in (LossType.MSE, LossType.RESCALED_MSE):
        th.testing.assert_close(terms[loss]["loss"], terms[loss]["mse"] + terms[loss]["vb"])


def test_the_bound_teaches_the_variance_and_not_the_mean():
    var = ModelVarType.LEARNED_RANGE
    prediction = th.zeros(4, 3, 4, 4, requires_grad=True)
    values = th.zeros(4, 3, 4, 4, requires_grad=True)
    terms = build(40, var=var).training_losses(
        lambda x, t: th.cat([prediction, values], dim=1), images(), th.tensor([1, 5, 20, 39])
    )
    by_prediction, by_values = th.autograd.grad(terms["vb"].sum(), (prediction, values), allow_unused=True)
    assert by_prediction is None or not by_prediction.any()
    assert by_values.all()


@pytest.mark.parametrize(
    "mean",
    [ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.VELOCITY, ModelMeanType.EDM],
)
def test_with_the_perfect_model_the_bound_is_the_likelihood(mean):
    th.manual_seed(0)
    steps, std = 100, 0.05
    x_start = DATA_MEAN + std * th.randn(64, 100)
    diffusion = build(steps, mean=mean, var=ModelVarType.LEARNED)
    before = th.from_numpy(diffusion.alphas_cumprod_prev * std**2 + 1 - diffusion.alphas_cumprod_prev)
    after = th.from_numpy(diffusion.alphas_cumprod * std**2 + 1 - diffusion.alphas_cumprod)
    log_variance = th.log(before * th.from_numpy(diffusion.betas) / after)  # of x_{t-1} given x_t
    predict = gaussian_model(steps, mean=mean, data_std=std)

    def model(x, t):
        return th.cat([predict(x, t), log_variance[t].view(-1, 1).expand(x.shape)], dim=1)

    result = diffusion.calc_bpd_loop(model, x_start, clip_denoised=False)
    assert result["vb"].shape == result["mse"].shape == result["xstart_mse"].shape == (64, steps)
    assert result["prior_bpd"].shape == (64,)
    th.testing.assert_close(result["total_bpd"], result["vb"].sum(dim=1) + result["prior_bpd"])
    pixel_width = 2 / 255
    expected = -np.log2(stats.norm.pdf(x_start.numpy(), DATA_MEAN, std) * pixel_width).mean()
    assert result["total_bpd"].mean().item() == pytest.approx(expected, abs=0.02)
    # The first column is the noisiest timestep: there the image is guessed worst and the noise best.
    assert result["xstart_mse"][:, 0].mean() > result["xstart_mse"][:, -1].mean()
    assert result["mse"][:, 0].mean() < result["mse"][:, -1].mean()


def test_likelihoods_of_all_pixel_values_sum_to_one():
    levels = th.arange(256) / 127.5 - 1
    for mean in (-1.0, 0.2, 0.95):
        for log_scale in (-3.0, 0.0):
            log_likelihood = losses.discretized_gaussian_log_likelihood(
                levels, means=th.full_like(levels, mean), log_scales=th.full_like(levels, log_scale)
            )
            assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_likelihood_far_from_the_pixel_is_small_but_finite():
    x = th.tensor([-1.0, 0.0, 1.0])
    value = losses.discretized_gaussian_log_likelihood(x, means=-5 * x + 5, log_scales=th.full((3,), -6.0))
    assert value.isfinite().all() and (value < -10).all()


def test_normal_kl_agrees_with_torch_and_takes_numbers():
    generator = th.Generator().manual_seed(0)
    mean1, logvar1, mean2, logvar2 = (th.randn(5, generator=generator) for _ in range(4))
    first = th.distributions.Normal(mean1, (logvar1 / 2).exp())
    second = th.distributions.Normal(mean2, (logvar2 / 2).exp())
    th.testing.assert_close(
        losses.normal_kl(mean1, logvar1, mean2, logvar2), th.distributions.kl_divergence(first, second)
    )
    standard = th.distributions.Normal(0.0, 1.0)
    th.testing.assert_close(
        losses.normal_kl(mean1, logvar1, 0.0, 0.0), th.distributions.kl_divergence(first, standard)
    )


def test_normal_cdf_and_mean_flat():
    x = th.linspace(-4, 4, 200)
    np.testing.assert_allclose(losses.approx_standard_normal_cdf(x), stats.norm.cdf(x), atol=3e-4)
    th.testing.assert_close(losses.mean_flat(th.arange(12.0).view(2, 3, 2)), th.tensor([2.5, 8.5]))


# Respacing


@given(data=st.data(), num_timesteps=st.integers(1, 300))
def test_respacing_keeps_as_many_timesteps_as_asked_for(data, num_timesteps):
    count = data.draw(st.integers(1, num_timesteps))
    for counts in (str(count), f"ddim{count}", [count]):
        kept = space_timesteps(num_timesteps, counts)
        assert len(kept) == count
        assert min(kept) == 0 and max(kept) < num_timesteps
    if count > 1:
        assert num_timesteps - 1 in space_timesteps(num_timesteps, str(count))


@given(data=st.data(), num_timesteps=st.integers(1, 300), sections=st.integers(1, 8))
def test_sections_share_the_timesteps(data, num_timesteps, sections):
    bounds = [len(part) for part in np.array_split(np.arange(num_timesteps), sections)]
    if 0 in bounds:
        with pytest.raises(ValueError, match="section_counts"):
            space_timesteps(num_timesteps, [1] * sections)
        return
    counts = [data.draw(st.integers(1, size)) for size in bounds]
    kept = sorted(space_timesteps(num_timesteps, counts))
    edges = np.cumsum([0, *bounds])
    assert np.histogram(kept, bins=[*edges[:-1], edges[-1] - 0.5])[0].tolist() == counts
    assert set(kept) == space_timesteps(num_timesteps, ",".join(map(str, counts)))


@pytest.mark.parametrize(
    "text", ["", "ddim", "ddim0", "ddim-3", "0", "-5", "10,", "10,0", "10 20", "abc", "2.5"]
)
def test_malformed_respacing(text):
    with pytest.raises(ValueError, match="section_counts '.*': use a number"):
        space_timesteps(100, text)


def test_respacing_that_asks_for_too_much_names_the_limit():
    with pytest.raises(ValueError, match="section_counts ddim101: .* use ddim100 at most"):
        space_timesteps(100, "ddim101")
    with pytest.raises(ValueError, match="section 2 of 3 has only 33 of the 100 timesteps, not 34"):
        space_timesteps(100, "10,34,20")
    with pytest.raises(ValueError, match="section 1 of 1 has only 100 .* not 250"):
        space_timesteps(100, "250")
    with pytest.raises(ValueError, match="section_counts '': use a number"):
        space_timesteps(100, [])


@pytest.mark.parametrize("steps", [10, 12, 100])
def test_spaced_diffusion_keeps_alpha_bar(steps):
    original, spaced = build(steps), build(steps, respacing="2,3")
    np.testing.assert_allclose(
        spaced.alphas_cumprod, original.alphas_cumprod[spaced.timestep_map], rtol=1e-9, atol=1e-15
    )
    assert spaced.num_timesteps == 5 and spaced.original_num_steps == steps
    assert spaced.p_sample_loop(toy_model(), (2, 3, 4, 4)).isfinite().all()
    # With 10 steps, going from the last to the first keeps 1e-17 of the signal, less than 1 - beta can tell.
    assert build(steps, respacing="2").p_sample_loop(toy_model(), (2, 3, 4, 4)).isfinite().all()
    everything = build(steps, respacing=str(steps))
    np.testing.assert_allclose(everything.betas, original.betas, rtol=1e-9)


@pytest.mark.parametrize(("rescale", "expected"), [(False, [0, 3, 6, 9]), (True, [0.0, 300.0, 600.0, 900.0])])
def test_the_model_is_told_the_original_timestep_exactly_once_mapped(rescale, expected):
    seen = []

    def model(x, t):
        seen.append(t)
        return 0.1 * x

    diffusion = build(10, respacing="4", rescale_timesteps=rescale)
    diffusion.p_sample_loop(model, (1, 3, 4, 4))
    assert [t.item() for t in reversed(seen)] == expected
    assert seen[0].dtype == (th.float32 if rescale else th.int64)
    for evaluate in (
        lambda t: diffusion.training_losses(model, images(1), t),
        lambda t: diffusion.ddim_reverse_sample(model, images(1), t),
        lambda t: diffusion._vb_terms_bpd(model, images(1), images(1), t),
    ):
        evaluate(th.tensor([2]))
        assert seen[-1].item() == expected[2]
