"""The samplers against exact solutions, against diffusers, and against ancestral sampling and DDIM as they were."""

import math

import diffusers
import numpy as np
import pytest
import torch as th
from diffusions import build
from scipy.integrate import solve_ivp

from improved_diffusion.gaussian_diffusion import (
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.respace import space_timesteps
from improved_diffusion.samplers import SAMPLERS, SPACINGS, evaluations, sample_progressive, space_levels

EPSILON, START_X, PREVIOUS_X = ModelMeanType.EPSILON, ModelMeanType.START_X, ModelMeanType.PREVIOUS_X
VELOCITY, EDM = ModelMeanType.VELOCITY, ModelMeanType.EDM
ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 4, "deis": 3, "ipndm": 2}

# Data that need no network: independent pixels from a mixture of normal distributions (share, mean, std).
GAUSSIAN = [(1.0, 0.3, 0.5)]
MIXTURE = [(0.4, -0.5, 0.15), (0.6, 0.6, 0.25)]


def log_snr(diffusion, t):
    """lambda at (fractional) timesteps."""
    share = diffusion.alphas_cumprod
    return np.interp(t, np.arange(len(share)), np.log(share / (1 - share)) / 2)


def mix(diffusion, t, x):
    """alpha and sigma at the timesteps `t` [N], to multiply with x."""
    lam = th.from_numpy(log_snr(diffusion, t.double().numpy())).view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    return th.sigmoid(2 * lam).sqrt(), th.sigmoid(-2 * lam).sqrt()


def exact_eps(data, x, alpha, sigma):
    """What a perfect model of `data` predicts: the mean of eps given x."""
    variances = [(alpha * std) ** 2 + sigma**2 for _, _, std in data]
    distances = [x - alpha * mean for _, mean, _ in data]
    logs = [
        math.log(share) - d**2 / (2 * v) - v.log() / 2
        for (share, _, _), d, v in zip(data, distances, variances)
    ]
    weights = th.stack(logs).softmax(0)
    return (weights * th.stack([sigma * d / v for d, v in zip(distances, variances)])).sum(0)


def perfect_model(diffusion, data):
    """A model of the type that `diffusion` wants, in closed form; `diffusion` must have all timesteps."""

    def model(x, t):
        alpha, sigma = mix(diffusion, t, x)
        edm = sigma / alpha, diffusion.sigma_data, (sigma**2 / alpha**2 + diffusion.sigma_data**2) ** 0.5
        if diffusion.model_mean_type is EDM:  # Karras et al. 2022, table 1: it is given c_in times x / alpha
            x = x * alpha * edm[2]
        eps = exact_eps(data, x, alpha, sigma)
        if diffusion.model_mean_type is EPSILON:
            return eps
        x0 = (x - sigma * eps) / alpha
        if diffusion.model_mean_type is START_X:
            return x0
        if diffusion.model_mean_type is VELOCITY:
            return alpha * eps - sigma * x0
        if diffusion.model_mean_type is EDM:
            noise_level, sigma_data, root = edm
            return (x0 - (sigma_data / root) ** 2 * x / alpha) * root / (noise_level * sigma_data)
        return diffusion.q_posterior_mean_variance(x0, x, t.long())[0]

    return model


def toy_model(learned=False):
    """Something smooth that depends on all that it is told; with channels for the variance when `learned`."""

    def model(x, t):
        time = t.to(x.dtype).view(-1, 1, 1, 1)
        values = 0.8 * th.sin(x + 0.3 * x.flip(-1)) + 0.2 * th.cos(0.01 * time)
        return th.cat([values, th.tanh(values)], dim=1) if learned else values

    return model


def noise(count=4, size=4, seed=0, dtype=th.float32):
    return th.randn(count, 3, size, size, generator=th.Generator().manual_seed(seed)).to(dtype)


def stream(seed=1):
    """A stand-in for randn_like that repeats itself, and not the global random numbers."""
    generator = th.Generator().manual_seed(seed)
    return lambda x: th.randn(x.shape, generator=generator).to(x.dtype)


def run(model, diffusion, x, sampler, steps, **options):
    """All the samples, one after each step."""
    results = sample_progressive(model, diffusion, x, sampler=sampler, steps=steps, **options)
    return [result["sample"] for result in results]


# Exact solutions


def flow(data, diffusion, x):
    """Where the probability flow takes x [n] from the first to the last level, by an integrator of scipy's."""
    first, last = log_snr(diffusion, [diffusion.num_timesteps - 1, 0])

    def slope(lam, scaled):  # of x / alpha over lambda; d(sigma / alpha) = -(sigma / alpha) d(lambda)
        lam = th.tensor(lam, dtype=th.float64)
        alpha, sigma = th.sigmoid(2 * lam).sqrt(), th.sigmoid(-2 * lam).sqrt()
        return (-sigma / alpha * exact_eps(data, alpha * th.from_numpy(scaled), alpha, sigma)).numpy()

    alpha = [1 / math.sqrt(1 + math.exp(-2 * lam)) for lam in (first, last)]
    solution = solve_ivp(slope, (first, last), x.numpy() / alpha[0], method="DOP853", rtol=1e-12, atol=1e-13)
    return th.from_numpy(alpha[1] * solution.y[:, -1])


@pytest.mark.parametrize("sampler", ORDERS)
def test_error_falls_at_the_order_of_the_solver(sampler):
    diffusion = build()
    x = th.linspace(-2, 2, 400, dtype=th.float64)
    exact = flow(MIXTURE, diffusion, x)

    def error(steps):
        samples = run(
            perfect_model(diffusion, MIXTURE),
            diffusion,
            x.view(-1, 1, 1, 1),
            sampler,
            steps,
            spacing="logsnr",
            clip_denoised=False,
        )
        # Not the last one: the step from there to the image is the same for all, whatever their number.
        return (samples[-2].flatten() - exact).pow(2).mean().sqrt()

    order = math.log2(error(80) / error(160))
    assert order == pytest.approx(ORDERS[sampler], abs=0.15)


def test_second_order_pays_in_random_samplers_too():
    """What few steps make of a Gaussian: the variance, exactly, from what each step does to it."""
    diffusion = build()

    def variance(sampler, steps):
        # Linear in x and the noise: the mean square over unit inputs, one for x and one for each draw.
        total, model = 0.0, perfect_model(diffusion, [(1.0, 0.0, 0.5)])
        for source in range(steps):
            calls = []

            def draw(x, calls=calls, source=source):
                calls.append(0)
                return th.full_like(x, float(len(calls) == source))

            x = th.full((1, 1, 1, 1), float(source == 0), dtype=th.float64)
            options = {"spacing": "logsnr", "eta": 1.0, "clip_denoised": False, "randn_like": draw}
            total += run(model, diffusion, x, sampler, steps, **options)[-1].item() ** 2
        return total

    errors = {name: [abs(variance(name, n) - 0.25) for n in (20, 40)] for name in ("ddim", "sde_dpmpp_2m")}
    assert errors["sde_dpmpp_2m"][0] < errors["ddim"][0] / 3
    assert errors["sde_dpmpp_2m"][1] < errors["sde_dpmpp_2m"][0] / 3


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_deterministic_samplers_reach_mean_and_variance(sampler, schedule):
    diffusion = build(schedule=schedule)
    quantiles = (th.arange(2000, dtype=th.float64) + 0.5) / 2000
    x = th.special.ndtri(quantiles).view(-1, 1, 1, 1)
    model = perfect_model(diffusion, GAUSSIAN)
    images = run(model, diffusion, x, sampler, 250, spacing="logsnr", clip_denoised=False)[-1]
    # Noise of mean 0 is where a Gaussian of mean alpha m would be, hence 5e-3 and not less.
    tolerance = 1e-2 if sampler == "ddim" else 5e-3
    assert images.mean().item() == pytest.approx(0.3, abs=tolerance)
    assert images.std().item() == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize(
    "sampler, eta",
    [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5), ("sde_dpmpp_2m", 1.0), ("sde_dpmpp_2m", 0.5)],
)
def test_random_samplers_reach_mean_and_variance(sampler, eta):
    diffusion = build(500)
    x = noise(40, 12)
    model = perfect_model(diffusion, GAUSSIAN)
    images = run(model, diffusion, x, sampler, 500, eta=eta, clip_denoised=False, randn_like=stream())[-1]
    assert images.mean().item() == pytest.approx(0.3, abs=0.015)
    assert images.std().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_model_predicts_makes_no_difference(sampler):
    x = noise(dtype=th.float64)
    images = []
    for mean in (EPSILON, START_X, VELOCITY, EDM):
        diffusion = build(100, mean=mean)
        model = perfect_model(diffusion, MIXTURE)
        images.append(run(model, diffusion, x, sampler, 12, clip_denoised=False, randn_like=stream())[-1])
    for others in images[1:]:
        th.testing.assert_close(images[0], others, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("mean", [START_X, VELOCITY, EDM])
def test_nor_does_it_between_whole_timesteps(sampler, mean):
    x = noise(dtype=th.float64)
    images = []
    for diffusion in (build(100), build(100, mean=mean)):
        options = {"clip_denoised": False, "randn_like": stream(), "spacing": "logsnr"}
        images.append(run(perfect_model(diffusion, MIXTURE), diffusion, x, sampler, 12, **options)[-1])
    th.testing.assert_close(*images, rtol=0, atol=1e-9)


def test_a_model_of_the_previous_x_is_refused():
    with pytest.raises(ValueError, match="PREVIOUS_X: .* sample with p_sample_loop"):
        run(toy_model(), build(mean=PREVIOUS_X), noise(), "unipc", 10)


# Ancestral sampling and DDIM as `GaussianDiffusion` has them


@pytest.mark.parametrize("var", ModelVarType)
@pytest.mark.parametrize("mean, clip", [(EPSILON, True), (VELOCITY, True), (EDM, True), (START_X, False)])
@pytest.mark.parametrize("rescale", [False, True])
def test_ddpm_is_ancestral_sampling(var, mean, clip, rescale):
    settings = {"mean": mean, "var": var, "rescale_timesteps": rescale}
    spaced = build(40, respacing="10", **settings)
    model = toy_model(learned=var in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE))
    x = noise()
    options = {"clip_denoised": clip, "randn_like": stream()}
    expected = spaced.p_sample_loop(model, x.shape, noise=x, **options)
    for diffusion in (spaced, build(40, **settings)):
        options["randn_like"] = stream()
        th.testing.assert_close(
            run(model, diffusion, x, "ddpm", 10, **options)[-1], expected, rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_ddim(eta):
    spaced, x = build(40, respacing="10"), noise()
    expected = spaced.ddim_sample_loop(toy_model(), x.shape, noise=x, eta=eta, randn_like=stream())
    images = run(toy_model(), build(40), x, "ddim", 10, eta=eta, randn_like=stream())[-1]
    th.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_with_eta_1_is_ancestral_sampling(spacing):
    x = noise(dtype=th.float64)
    ddim, ddpm = (
        run(toy_model(), build(), x, sampler, 10, spacing=spacing, eta=eta, randn_like=stream())
        for sampler, eta in (("ddim", 1.0), ("ddpm", 0.0))
    )
    th.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-9)


def test_inverted_and_sampled_again_is_the_image():
    diffusion = build()
    model = perfect_model(diffusion, MIXTURE)
    images = noise(2, seed=3).tanh()
    latent = diffusion.ddim_reverse_loop(model, images, clip_denoised=False)
    assert latent.std().item() == pytest.approx(1, abs=0.3)
    back = run(model, diffusion, latent, "ddim", 1000, clip_denoised=False)[-1]
    assert (back - images).abs().max() < 0.02


# diffusers

LEVELS = [999 - 111 * i for i in range(10)]  # "uniform" with 10 of 1000
MODEL = perfect_model(build(), MIXTURE)


def in_diffusers(scheduler, x, **options):
    """The samples of a scheduler, at the timesteps LEVELS, whatever it would have chosen."""
    samples = []
    for t in scheduler.timesteps:
        eps = MODEL(x, th.full((len(x),), t))
        x = scheduler.step(eps, t, x, **options).prev_sample
        samples.append(x)
    return samples


def at_levels(kind, **config):
    scheduler = getattr(diffusers, kind)(trained_betas=build().betas.astype(np.float32), **config)
    scheduler.set_timesteps(10)
    scheduler.timesteps = th.tensor(LEVELS)
    scheduler.sigmas = th.tensor([math.exp(-lam) for lam in log_snr(build(), LEVELS)] + [0.0])
    return scheduler


def ours(sampler, **options):
    return run(MODEL, build(), noise(), sampler, 10, clip_denoised=False, **options)


def assert_same(samples, others, count):
    """The first `count` of the samples are the same."""
    for ours, theirs in list(zip(samples, others, strict=True))[:count]:
        th.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_in_diffusers(eta):
    scheduler = at_levels("DDIMScheduler", clip_sample=False)
    scheduler.num_inference_steps = 9  # it takes 1000 // 9 = 111 for the distance between timesteps
    draw, x, samples = stream(), noise(), []
    for t in LEVELS:
        eps = MODEL(x, th.full((len(x),), t))
        # It wants noise in its last step as well, and adds none there.
        x = scheduler.step(eps, t, x, eta=eta, variance_noise=draw(x)).prev_sample
        samples.append(x)
    assert_same(ours("ddim", eta=eta, randn_like=stream()), samples, 10)


@pytest.mark.parametrize("var", ["fixed_small", "fixed_large"])
def test_ddpm_in_diffusers(var):
    scheduler = diffusers.DDPMScheduler(
        trained_betas=build().betas.astype(np.float32), variance_type=var, clip_sample=True
    )
    scheduler.set_timesteps(timesteps=LEVELS)
    samples = in_diffusers(scheduler, noise(), generator=th.Generator().manual_seed(1))
    diffusion = build(var=ModelVarType[var.upper()])
    assert_same(run(MODEL, diffusion, noise(), "ddpm", 10, randn_like=stream()), samples, 10)


def test_dpmpp_2m_in_diffusers():
    scheduler = at_levels("DPMSolverMultistepScheduler", solver_order=2, final_sigmas_type="zero")
    assert_same(ours("dpmpp_2m"), in_diffusers(scheduler, noise()), 10)


def test_sde_dpmpp_2m_in_diffusers():
    scheduler = at_levels(
        "DPMSolverMultistepScheduler",
        solver_order=2,
        final_sigmas_type="zero",
        algorithm_type="sde-dpmsolver++",
    )
    draw, x, samples = stream(), noise(), []
    for t in scheduler.timesteps:
        eps = MODEL(x, th.full((len(x),), t))
        x = scheduler.step(eps, t, x, variance_noise=draw(x)).prev_sample
        samples.append(x)
    assert_same(ours("sde_dpmpp_2m", eta=1.0, randn_like=stream()), samples, 10)
    assert_same(ours("sde_dpmpp_2m"), ours("dpmpp_2m"), 10)


def test_dpmpp_3m_in_diffusers():
    # Not DPMSolverMultistepScheduler: it takes half of the parabola's curvature, and its order is 2 then.
    # UniPC's predictor alone is the same as DPM-Solver++.
    scheduler = at_levels("UniPCMultistepScheduler", solver_order=3, disable_corrector=list(range(10)))
    assert_same(ours("dpmpp_3m"), in_diffusers(scheduler, noise()), 10)


def test_unipc_in_diffusers():
    scheduler = at_levels("UniPCMultistepScheduler", solver_order=3, solver_type="bh2")
    assert_same(ours("unipc"), in_diffusers(scheduler, noise()), 10)


def test_deis_in_diffusers():
    # Its last step divides infinities when it leads to an image without noise.
    scheduler = at_levels("DEISMultistepScheduler", solver_order=3)
    assert_same(ours("deis"), in_diffusers(scheduler, noise()), 9)


def test_heun_in_diffusers():
    # It works on x / alpha, and its timesteps and sigmas are those of model calls.
    scheduler = at_levels("HeunDiscreteScheduler")
    scheduler.timesteps = scheduler.timesteps.repeat_interleave(2)[1:]
    scheduler.sigmas = th.cat(
        [scheduler.sigmas[:1], scheduler.sigmas[1:-1].repeat_interleave(2), th.zeros(1)]
    )
    alpha = 1 / (1 + scheduler.sigmas**2).sqrt()
    x, samples = noise() / alpha[0], []
    for call, t in enumerate(scheduler.timesteps):
        eps = MODEL(scheduler.scale_model_input(x, t), th.full((len(x),), t))
        x = scheduler.step(eps, t, x).prev_sample
        if call % 2:
            samples.append(alpha[call + 1] * x)
    assert_same(ours("heun"), [*samples, x], 10)


def test_ipndm_in_diffusers():
    scheduler = at_levels("IPNDMScheduler")
    scheduler.alphas = 1 / (1 + scheduler.sigmas**2).sqrt()
    scheduler.betas = (1 - scheduler.alphas**2).sqrt()
    x, samples = noise(), []
    for i, t in enumerate(LEVELS):
        eps = MODEL(x, th.full((len(x),), t))
        velocity = (eps - scheduler.betas[i] * x) / scheduler.alphas[i]
        x = scheduler.step(velocity, t, x).prev_sample
        samples.append(x)
    assert_same(ours("ipndm"), samples, 7)  # it does not lower the order at the end


# What holds for all


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_number_of_steps_is_finite_and_counted(sampler, schedule):
    calls = []

    def model(x, t):
        calls.append(t)
        return toy_model(learned=True)(x, t)

    for timesteps in (1, 2, 4, 10, 1000):
        diffusion = build(timesteps, schedule=schedule, var=ModelVarType.LEARNED_RANGE)
        for steps in {1, 2, 3, 4, 10} & set(range(timesteps + 1)):
            for spacing in SPACINGS:
                calls.clear()
                samples = run(model, diffusion, noise(1, 2), sampler, steps, spacing=spacing)
                assert len(samples) == steps and len(calls) == evaluations(sampler, steps)
                assert all(sample.isfinite().all() and sample.dtype == th.float32 for sample in samples)
                assert samples[-1].abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_predicted_images_are_clipped_on_request(sampler):
    for clip in (True, False):
        results = sample_progressive(
            lambda x, t: -3 * x, build(), noise(), sampler=sampler, steps=6, clip_denoised=clip
        )
        largest = max(result["pred_xstart"].abs().max() for result in results)
        assert (largest <= 1) == clip


@pytest.mark.parametrize("sampler", ORDERS)
def test_deterministic_samplers_draw_no_noise_and_need_no_variance(sampler):
    def no_noise(x):
        raise AssertionError("drew noise")

    fixed = run(toy_model(), build(), noise(), sampler, 8, randn_like=no_noise)
    learned = build(var=ModelVarType.LEARNED_RANGE)
    th.testing.assert_close(run(toy_model(learned=True), learned, noise(), sampler, 8), fixed, rtol=0, atol=0)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 1.0), ("sde_dpmpp_2m", 0.5)])
def test_noise_comes_from_randn_like_alone(sampler, eta):
    runs = []
    for seed in (1, 1, 2):
        th.manual_seed(len(runs))
        runs.append(run(toy_model(), build(), noise(), sampler, 8, eta=eta, randn_like=stream(seed))[-1])
    assert th.equal(runs[0], runs[1]) and not th.allclose(runs[0], runs[2], atol=1e-2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_model_arguments_arrive_and_no_gradient_is_kept(sampler):
    weight = th.nn.Parameter(th.ones(()))
    labels = th.tensor([5, 6])

    def model(x, t, y):
        assert y is labels and t.shape == (2,)
        return weight * toy_model()(x, t)

    results = sample_progressive(
        model, build(), noise(2), sampler=sampler, steps=5, model_kwargs={"y": labels}
    )
    for result in results:
        assert th.is_grad_enabled()
        assert not result["sample"].requires_grad and not result["pred_xstart"].requires_grad


def test_results_tell_the_image_that_a_step_went_for():
    x = noise()
    first, *_, last = sample_progressive(toy_model(), build(), x, sampler="dpmpp_2m", steps=5)
    told = build().p_mean_variance(toy_model(), x, th.full((4,), 999))
    th.testing.assert_close(first["pred_xstart"], told["pred_xstart"], rtol=0, atol=1e-4)
    assert th.equal(last["sample"], last["pred_xstart"])


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_few_steps_survive_the_noisy_end_of_the_cosine_schedule(sampler, spacing):
    diffusion = build(schedule="cosine")  # sigma / alpha starts at 20,000
    model = perfect_model(diffusion, MIXTURE)
    images = run(model, diffusion, noise(), sampler, 10, spacing=spacing, clip_denoised=False)[-1]
    assert images.abs().max() < 2


@pytest.mark.parametrize("spread, most", [(1, 0.7), (2, 2.5)])
def test_default_steps_keep_what_images_vary_in(spread, most):
    """The sampler is linear here, so the answers to each of its random numbers alone give the variance exactly."""
    # About as in natural images, from the mean colour down to details.
    std = spread * 15 / th.arange(1, 1025, dtype=th.float64)
    diffusion, steps = build(), 20
    x = th.zeros(steps, 1, 1, len(std), dtype=th.float64)
    x[0] = 1
    drawn = []

    def impulse(x):
        drawn.append(0)
        alone = th.zeros_like(x)
        alone[len(drawn)] = 1
        return alone

    model = perfect_model(diffusion, [(1.0, 0.0, std)])
    options = {"spacing": "karras", "eta": 1.0, "clip_denoised": False, "randn_like": impulse}
    answers = run(model, diffusion, x, "sde_dpmpp_2m", steps, **options)[-1]
    assert len(drawn) == steps - 1
    frechet = (answers.square().sum(0).sqrt() - std).square().sum()
    assert frechet < most


# The levels


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_levels_fall_from_the_last_timestep_to_the_first(spacing, schedule):
    for timesteps in (1, 2, 4, 10, 1000):
        for steps in {1, 2, 3, 10, timesteps} & set(range(timesteps + 1)):
            diffusion = build(timesteps, schedule=schedule)
            levels = space_levels(diffusion, steps, spacing)
            noisiest = log_snr(diffusion, timesteps - 1)
            if spacing in ("logsnr", "karras") and noisiest < -5.1:
                assert levels[0] < timesteps - 1
                assert log_snr(diffusion, levels[0]) == pytest.approx(-5.1)
            else:
                assert levels[0] == timesteps - 1
            assert len(levels) == steps
            assert (np.diff(levels) < 0).all() and (steps == 1 or levels[-1] == 0)


def assert_even(values):
    steps = np.diff(values)
    assert steps == pytest.approx(np.full(len(steps), steps.mean()), rel=1e-9)


def test_levels_are_even_in_what_the_spacing_says():
    diffusion = build()
    assert set(space_levels(diffusion, 250, "uniform")) == space_timesteps(1000, "250")
    for spacing, measure in {
        "quadratic": np.sqrt,
        "logsnr": lambda t: log_snr(diffusion, t),
    }.items():
        assert_even(measure(space_levels(diffusion, 20, spacing)))


def test_karras_levels_are_even_below_much_noise():
    for diffusion, noisiest in (
        (build(), math.exp(-log_snr(build(), 999))),
        (build(schedule="cosine"), math.exp(5.1)),
    ):
        sigma = np.exp(-log_snr(diffusion, space_levels(diffusion, 20, "karras")))
        assert sigma[:2] == pytest.approx([noisiest, 40], rel=1e-6)
        assert_even(sigma[1:] ** (1 / 7))


def test_few_karras_levels_are_all_even():
    for steps, second in ((3, 5.91), (5, 36.9)):
        sigma = np.exp(-log_snr(build(), space_levels(build(), steps, "karras")))
        assert sigma[1] == pytest.approx(second, rel=0.01)
        assert_even(sigma ** (1 / 7))


def test_karras_levels_are_all_even_where_there_is_little_noise():
    diffusion = build(betas=np.linspace(1e-4, 5e-3, 1000))
    sigma = np.exp(-log_snr(diffusion, space_levels(diffusion, 8, "karras")))
    assert sigma[0] == pytest.approx(math.exp(-log_snr(diffusion, 999))) and sigma[0] < 40
    assert_even(sigma ** (1 / 7))


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_no_steps_are_lost_where_there_is_only_noise(spacing):
    diffusion = build(schedule="cosine")
    lam = log_snr(diffusion, space_levels(diffusion, 20, spacing))
    assert log_snr(diffusion, 999) < -9 and lam.min() == lam[0] == pytest.approx(-5.1)


def test_the_model_is_told_timesteps_of_the_whole_diffusion():
    for rescale, scale in ((False, 1), (True, 2.5)):
        diffusion = build(400, respacing="50", rescale_timesteps=rescale)
        told = []

        def model(x, t, told=told):
            told.append(t)
            return x

        run(model, diffusion, noise(), "ddim", 7, spacing="logsnr")
        levels = space_levels(diffusion, 7, "logsnr")
        expected = scale * np.interp(levels, np.arange(50), diffusion.timestep_map)
        assert all(t.dtype == th.float32 and t.shape == (4,) for t in told)
        assert [t[0].item() for t in told] == pytest.approx(expected, rel=1e-6)
        assert told[-1][0] == 0 and told[2][0] % 1 != 0


# The user's mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sampler": "euler"}, "sampler 'euler'.*dpmpp_2m"),
        ({"spacing": "cubic"}, "spacing 'cubic'.*logsnr"),
        ({"steps": 0}, "steps 0.*1 to 40"),
        ({"steps": 41}, "steps 41.*1 to 40"),
        ({"eta": 1.5}, "eta 1.5"),
        ({"eta": -0.1}, "eta -0.1"),
        ({"eta": math.nan}, "eta nan"),
        ({"eta": 0.5, "sampler": "unipc"}, "eta 0.5.*unipc"),
        ({"eta": 1.0, "sampler": "ddpm"}, "eta 1.0.*ddpm"),
    ],
)
def test_mistakes_are_named_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        sample_progressive(toy_model(), build(40), noise(), **{"sampler": "ddim", "steps": 10, **options})
