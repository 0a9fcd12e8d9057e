"""The Gaussian diffusion process: noise schedules, forward and reverse process, losses, bound, samplers.

Timesteps run from 0 (least noise) to T - 1 (nearly only noise). With betas beta_t, alpha_t = 1 - beta_t and
alpha_bar_t = alpha_0 ... alpha_t, the forward process q turns an image x_start into x_t:

    q(x_t | x_start) = N(sqrt(alpha_bar_t) x_start, (1 - alpha_bar_t) I).

The reverse process p(x_{t-1} | x_t) = N(mean, variance) turns noise into an image. The model predicts its mean and,
if it learns the variance, its variance. At t = 0, "x_{t-1}" is the image itself, without noise.

Images are float32 tensors [N, C, H, W], or of any other shape [N, C, ...], scaled to [-1, 1]. Timesteps are int64 [N].
A model is any callable `model(x, timesteps, **model_kwargs)`. It returns a tensor of x's shape. If it learns the
variance, it returns twice as many channels; the second half is for the variance.

Ho et al. 2020: "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
Song et al. 2020: "Denoising Diffusion Implicit Models" (DDIM), arXiv 2010.02502.
Nichol & Dhariwal 2021: "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672.
Salimans & Ho 2022: "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512.
Karras et al. 2022: "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), arXiv 2206.00364.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch as th
from torch import Tensor
from tqdm import tqdm

from improved_diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl

MAX_BETA = 0.999  # a beta of 1 would leave nothing of the image, and make the reverse process divide by zero
NATS_PER_BIT = math.log(2)


def get_named_beta_schedule(name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a schedule, float64 [num_diffusion_timesteps].

    ``"linear"``: from 1e-4 to 0.02 in 1000 steps (Ho et al. 2020, section 4). For T steps, they are multiplied by
    1000 / T, so that the last step has the same noise. ``"cosine"``: Nichol & Dhariwal 2021, eq. 17.

    :raises ValueError: there is no such schedule, or no timestep.
    """
    if num_diffusion_timesteps < 1:
        raise ValueError(f"num_diffusion_timesteps {num_diffusion_timesteps}: must be at least 1")
    if name == "linear":
        scale = 1000 / num_diffusion_timesteps
        betas = np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
        betas[-1] = scale * 0.02  # with T = 1, linspace returns the first value only
        return np.minimum(betas, MAX_BETA)
    if name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise ValueError(f"schedule {name!r}: use linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> np.ndarray:
    """The betas, float64 [num_diffusion_timesteps], for a given alpha_bar (Nichol & Dhariwal 2021, eq. 17).

    :param alpha_bar: a falling function of the time from 0 (no noise) to 1.
    :param max_beta: upper limit of each beta; it keeps the last ones away from 1.
    """
    times = [i / num_diffusion_timesteps for i in range(num_diffusion_timesteps + 1)]
    return np.array(
        [min(1 - alpha_bar(later) / alpha_bar(time), max_beta) for time, later in zip(times, times[1:])]
    )


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_start
    EPSILON = enum.auto()  # the noise in x_t
    VELOCITY = enum.auto()  # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_start (Salimans & Ho 2022)
    EDM = enum.auto()  # F of Karras et al. 2022, eq. 7; see `GaussianDiffusion`


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # the variance of q(x_{t-1} | x_t, x_start): exact if all images are the same
    FIXED_LARGE = enum.auto()  # beta_t: exact if images are standard normal noise
    LEARNED_RANGE = enum.auto()  # the model interpolates the logarithm between these two


class LossType(enum.Enum):
    """What training minimizes."""

    MSE = (
        enum.auto()
    )  # squared error of the prediction; if the variance is learned, plus the bound's term at t
    RESCALED_MSE = enum.auto()  # the same, with the bound's term times T / 1000
    KL = enum.auto()  # the variational bound's term at t
    RESCALED_KL = enum.auto()  # the same times T: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """A diffusion process with T = len(betas) steps.

    :param betas: the variance that each step adds, [T], strictly between 0 and 1.
    :param rescale_timesteps: whether the model is given t * 1000 / T instead of t.
    :param sigma_data: standard deviation of the images, for EDM. The model is given x_t / q, of variance 1, and
        returns F, which stands for x_start = (alpha sigma_data^2 / q^2) x_t + (sigma sigma_data / q) F. Here q^2 =
        sigma^2 + alpha^2 sigma_data^2, alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar. This is Karras et al. 2022,
        table 1, whose x is our x_t / alpha and whose sigma is our sigma / alpha. With sigma_data 1, q is 1 and F is -v.
    :param loss_weighting: a function from the noise sigma / alpha of all timesteps, [T], to the weights of the squared
        error of x_start, [T]; see `weighting`. None: the squared error of the model's prediction has weight 1.
    :raises ValueError: a weighting is given, but the loss is not a squared error.

    The coefficients (`alphas_cumprod` and the other arrays) are float64 [T].
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        sigma_data: float = 0.5,
        loss_weighting: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.sigma_data = sigma_data

        self.betas = betas = np.asarray(betas, dtype=np.float64)
        assert betas.ndim == 1 and betas.size and (betas > 0).all() and (betas < 1).all()
        self.num_timesteps = len(betas)
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_start), forwards and solved for x_start
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_start): Ho et al. 2020, eq. 7
        remaining = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * remaining
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = np.sqrt(alphas) * remaining

        # At t = 0 the variance is 0. In place of its logarithm stands that of t = 1.
        first_variance = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first_variance, self.posterior_variance[1:]))
        self._fixed_large_log_variance = np.log(np.append(first_variance, betas[1:]))
        self._relate_prediction_to_x_start()
        self.loss_weighting = loss_weighting
        if loss_weighting is not None:
            if loss_type.is_vb():
                raise ValueError(
                    "loss_weighting: needs a loss with a squared error, which use_kl does not have"
                )
            # An error of the prediction, times this factor, is the error of x_start.
            factor = self._x_start_from_prediction
            self._mse_weight = loss_weighting(self.sqrt_recipm1_alphas_cumprod) * factor**2

    def _relate_prediction_to_x_start(self) -> None:
        """Set the coefficients, each [T], of these equations:

        x_start = `_x_start_from_x` x_t + `_x_start_from_prediction` prediction;
        with VELOCITY and EDM also prediction = `_prediction_from_noise` noise + `_prediction_from_x_start` x_start.
        """
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if self.model_mean_type is ModelMeanType.EPSILON:
            from_x, from_prediction = self.sqrt_recip_alphas_cumprod, -self.sqrt_recipm1_alphas_cumprod
        elif self.model_mean_type is ModelMeanType.START_X:
            from_x, from_prediction = np.zeros_like(alpha), np.ones_like(alpha)
        elif self.model_mean_type is ModelMeanType.PREVIOUS_X:
            # The prediction is the mean of q(x_{t-1} | x_t, x_start), solved for x_start.
            from_x = -self.posterior_mean_coef2 / self.posterior_mean_coef1
            from_prediction = 1 / self.posterior_mean_coef1
        elif self.model_mean_type is ModelMeanType.VELOCITY:
            from_x, from_prediction = alpha, -sigma
            self._prediction_from_noise, self._prediction_from_x_start = alpha, -sigma
        else:
            deviation = np.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)  # of x_t
            self._input_scale = 1 / deviation
            from_x = alpha * (self.sigma_data / deviation) ** 2
            from_prediction = sigma * self.sigma_data / deviation
            self._prediction_from_noise = -alpha * self.sigma_data / deviation
            self._prediction_from_x_start = sigma / (self.sigma_data * deviation)
        self._x_start_from_x, self._x_start_from_prediction = from_x, from_prediction

    # The forward process q

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_start), of x_start's shape (Ho et al. 2020, eq. 4)."""
        return (
            _at(self.sqrt_alphas_cumprod, t, x_start) * x_start,
            _at(1 - self.alphas_cumprod, t, x_start),
            _at(self.log_one_minus_alphas_cumprod, t, x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t, of x_start's shape, from q(x_t | x_start) (Ho et al. 2020, eq. 4).

        :param noise: standard normal, of x_start's shape; drawn when not given.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        return (
            _at(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + _at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_{t-1} | x_t, x_start) (Ho et al. 2020, eq. 6 and 7).

        Each is of x_t's shape. At t = 0 the variance is 0, and the log-variance is that of t = 1.
        """
        return (
            _at(self.posterior_mean_coef1, t, x_t) * x_start + _at(self.posterior_mean_coef2, t, x_t) * x_t,
            _at(self.posterior_variance, t, x_t),
            _at(self.posterior_log_variance_clipped, t, x_t),
        )

    # The reverse process p

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps given to the model at the steps `t` [N]: `t` itself, or rescaled (float32)."""
        return rescale_to_thousand(t, self.num_timesteps) if self.rescale_timesteps else t

    def p_mean_variance(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """The distribution p(x_{t-1} | x_t) and the image that the model predicts (Ho et al. 2020, eq. 1 and 11).

        :param x: x_t.
        :param clip_denoised: whether the predicted image is clipped to [-1, 1].
        :param denoised_fn: a function that is applied to the predicted image before it is clipped.
        :param model_kwargs: further arguments of the model, such as the labels `y`.
        :return: `mean`, `variance`, `log_variance` and `pred_xstart`, each of x's shape. With FIXED_SMALL,
            the variance at t = 0 is 0, and the log-variance is that of t = 1.
        """
        prediction, variance_values = self.predict(model, x, t, model_kwargs)
        return self._reverse_step(prediction, variance_values, x, t, clip_denoised, denoised_fn)

    def predict(
        self, model: Callable[..., Tensor], x: Tensor, t: Tensor, model_kwargs: dict | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The model's prediction and, if it learns the variance, its output for that; both of x's shape.

        :param x: x_t. The results have its precision, but at least float32.
        """
        dtype = th.promote_types(x.dtype, th.float32)
        timesteps = self.model_timesteps(t)
        timesteps = timesteps.to(dtype) if timesteps.is_floating_point() else timesteps
        scaled = x * _at(self._input_scale, t, x) if self.model_mean_type is ModelMeanType.EDM else x
        output = model(scaled, timesteps, **(model_kwargs or {})).to(dtype)
        variance_values = None
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, variance_values = output.chunk(2, dim=1)
        assert output.shape == x.shape, "the model's output channels do not match the variance type"
        return output, variance_values

    def predicted_x_start(
        self,
        prediction: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The image that the model's `prediction` at x = x_t stands for, of x's shape.

        The other arguments are those of `p_mean_variance`.
        """
        x_start = _at(self._x_start_from_x, t, x) * x + _at(self._x_start_from_prediction, t, x) * prediction
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        return x_start.clamp(-1, 1) if clip_denoised else x_start

    def eps_of(self, x_start: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise eps in x = x_t, given that its image is `x_start`, of x's shape (Ho et al. 2020, eq. 4)."""
        return (_at(self.sqrt_recip_alphas_cumprod, t, x) * x - x_start) / _at(
            self.sqrt_recipm1_alphas_cumprod, t, x
        )

    def _reverse_step(
        self,
        prediction: Tensor,
        variance_values: Tensor | None,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What `p_mean_variance` returns, computed from the results of `predict`."""
        pred_xstart = self.predicted_x_start(prediction, x, t, clip_denoised, denoised_fn)
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            mean = prediction
        else:
            mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        log_variance = self.log_variance(variance_values, x, t)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            variance = _at(self.posterior_variance, t, x)
        else:
            variance = log_variance.exp()
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def log_variance(self, variance_values: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
        """The logarithm of the variance of p(x_{t-1} | x_t), of x's shape.

        :param variance_values: the model's output for it, of x's shape, if the model learns it.
        """
        if self.model_var_type is ModelVarType.LEARNED:
            return variance_values
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            return _at(self._fixed_large_log_variance, t, x)
        smallest = _at(self.posterior_log_variance_clipped, t, x)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return smallest
        # Nichol & Dhariwal 2021, eq. 15; the model's output runs from -1 to 1.
        share = (variance_values + 1) / 2
        return share * _at(np.log(self.betas), t, x) + (1 - share) * smallest

    # Ancestral sampling

    def p_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
        randn_like: Callable[[Tensor], Tensor] = th.randn_like,
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} from p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2); at t = 0, return the mean.

        :param randn_like: draws the noise: given a tensor, it returns noise of that shape. So each image can have
            its own random stream. The other arguments are those of `p_mean_variance`.
        :return: `sample` and `pred_xstart`, of x's shape.
        """
        step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = _not_at_zero(t, x) * randn_like(x)
        return {
            "sample": step["mean"] + th.exp(0.5 * step["log_variance"]) * noise,
            "pred_xstart": step["pred_xstart"],
        }

    def p_sample_loop(
        self, model: Callable[..., Tensor], shape: Sequence[int], noise: Tensor | None = None, **options
    ) -> Tensor:
        """Draw images of `shape` by ancestral sampling (Ho et al. 2020, algorithm 2).

        :param options: as in `p_sample_loop_progressive`.
        """
        return _last_sample(self.p_sample_loop_progressive(model, shape, noise, **options))

    def p_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        randn_like: Callable[[Tensor], Tensor] = th.randn_like,
    ) -> Iterator[dict[str, Tensor]]:
        """Draw images by ancestral sampling, and yield the result of `p_sample` in each of the T steps.

        :param shape: of the images, [N, C, H, W].
        :param noise: standard normal noise of that shape, to start from; drawn when not given.
        :param device: where to compute; by default the device of the model, of the noise, or the CPU.
        :param progress: whether a progress bar is shown.
        """
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            randn_like=randn_like,
        )
        x = _starting_noise(model, shape, noise, device, randn_like)
        return _iterate(step, x, reversed(range(self.num_timesteps)), self.num_timesteps, progress)

    # DDIM sampling

    def ddim_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
        randn_like: Callable[[Tensor], Tensor] = th.randn_like,
    ) -> dict[str, Tensor]:
        """Go from x_t to x_{t-1} by DDIM (Song et al. 2020, eq. 12).

        :param eta: how much noise is replaced: 0 none; with 1, this is ancestral sampling with FIXED_SMALL. The
            other arguments are those of `p_sample`.
        :return: `sample` and `pred_xstart`, of x's shape.
        :raises ValueError: eta is not between 0 and 1.
        """
        if not 0 <= eta <= 1:
            raise ValueError(
                f"eta is {eta}; DDIM needs a value from 0 (deterministic) to 1 (ancestral sampling)"
            )
        prediction, _ = self.predict(model, x, t, model_kwargs)
        pred_xstart = self.predicted_x_start(prediction, x, t, clip_denoised, denoised_fn)
        # sigma_t^2 of eq. 16. With eta 1 it is the variance of q(x_{t-1} | x_t, x_start); at t = 0 it is 0.
        variance = eta**2 * self.posterior_variance
        sample = self._mix_anew(x, t, pred_xstart, self.alphas_cumprod_prev, variance)
        if eta:
            sample = sample + _at(np.sqrt(variance), t, x) * randn_like(x)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """Go from x_t to x_{t+1} by DDIM without fresh noise: a step from image to noise.

        This is Euler's method for the ODE of Song et al. 2020, eq. 14. After t = T - 1 comes pure noise.
        The arguments are those of `p_mean_variance`.

        :return: `sample` and `pred_xstart`, of x's shape.
        """
        prediction, _ = self.predict(model, x, t, model_kwargs)
        pred_xstart = self.predicted_x_start(prediction, x, t, clip_denoised, denoised_fn)
        no_variance = np.zeros(self.num_timesteps)
        sample = self._mix_anew(x, t, pred_xstart, self.alphas_cumprod_next, no_variance)
        return {"sample": sample, "pred_xstart": pred_xstart}

    def _mix_anew(
        self, x: Tensor, t: Tensor, pred_xstart: Tensor, alpha_bar: np.ndarray, variance: np.ndarray
    ) -> Tensor:
        """Mix the predicted image and the noise in x_t for another `alpha_bar` [T], and leave out `variance` [T] of
        the noise, which the caller replaces by fresh noise."""
        eps = self.eps_of(pred_xstart, x, t)
        old_noise = np.sqrt(np.maximum(1 - alpha_bar - variance, 0))
        return _at(np.sqrt(alpha_bar), t, x) * pred_xstart + _at(old_noise, t, x) * eps

    def ddim_sample_loop(
        self, model: Callable[..., Tensor], shape: Sequence[int], noise: Tensor | None = None, **options
    ) -> Tensor:
        """Draw images of `shape` by DDIM (Song et al. 2020).

        :param options: as in `ddim_sample_loop_progressive`.
        """
        return _last_sample(self.ddim_sample_loop_progressive(model, shape, noise, **options))

    def ddim_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        randn_like: Callable[[Tensor], Tensor] = th.randn_like,
    ) -> Iterator[dict[str, Tensor]]:
        """Draw images by DDIM, and yield the result of `ddim_sample` in each of the T steps.

        The arguments are those of `p_sample_loop_progressive`, and `eta` of `ddim_sample`.
        """
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            randn_like=randn_like,
        )
        x = _starting_noise(model, shape, noise, device, randn_like)
        return _iterate(step, x, reversed(range(self.num_timesteps)), self.num_timesteps, progress)

    def ddim_reverse_loop(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The noise, of x_start's shape, from which `ddim_sample_loop` with eta 0 draws nearly the image `x_start`.

        The more timesteps there are, the closer the image is. The other arguments are those of
        `p_sample_loop_progressive`.
        """
        step = partial(
            self.ddim_reverse_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        # Sampling starts from x_{T-1}, so the last of the T steps, which leads to pure noise, is left out.
        steps = self.num_timesteps - 1
        return _last_sample(_iterate(step, x_start, range(steps), steps, progress), start=x_start)

    # Losses and the variational bound

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The training loss of each image at its timestep.

        :param noise: standard normal, of x_start's shape; drawn when not given.
        :return: `loss` [N], to be minimized. With the MSE losses also `mse` [N], the squared error of the model's
            prediction (Ho et al. 2020, eq. 14), and, if the variance is learned, `vb` [N], the bound's term as it
            counts in the loss: loss = mse + vb (Nichol & Dhariwal 2021, eq. 16). With a `loss_weighting`, loss =
            weight * mse + vb.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1
            return {"loss": scale * bound["output"]}

        prediction, variance_values = self.predict(model, x_t, t, model_kwargs)
        target = self._target(x_start, noise, x_t, t)
        mse = mean_flat((target - prediction) ** 2)
        weighted = mse if self.loss_weighting is None else mse * _at(self._mse_weight, t, mse)
        if variance_values is None:
            return {"mse": mse, "loss": weighted}

        # The bound trains the variance only. The mean is trained by the MSE, whose gradient has less noise.
        step = self._reverse_step(prediction.detach(), variance_values, x_t, t, clip_denoised=False)
        # In RESCALED_MSE the whole bound, which is T times its mean term, has the weight 1/1000.
        scale = self.num_timesteps / 1000 if self.loss_type is LossType.RESCALED_MSE else 1
        vb = scale * self._bound_of_step(step, x_start, x_t, t)
        return {"mse": mse, "vb": vb, "loss": weighted + vb}

    def _target(self, x_start: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What the model is trained to predict, of x_start's shape."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            return self.q_posterior_mean_variance(x_start, x_t, t)[0]
        return (
            _at(self._prediction_from_noise, t, x_t) * noise
            + _at(self._prediction_from_x_start, t, x_t) * x_start
        )

    def _vb_terms_bpd(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """The term of the variational bound at `t` (Ho et al. 2020, eq. 5).

        :return: `output` [N], bits per dimension, and `pred_xstart`, of x_t's shape.
        """
        step = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        return {
            "output": self._bound_of_step(step, x_start, x_t, t),
            "pred_xstart": step["pred_xstart"],
        }

    def _bound_of_step(self, step: dict[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term in bits per dimension, [N]: the KL divergence from the true posterior to p, or, at t = 0,
        the negative log-likelihood of the pixels."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, step["mean"], step["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=step["mean"], log_scales=0.5 * step["log_variance"]
        )
        return th.where(t == 0, mean_flat(-likelihood), mean_flat(kl)) / NATS_PER_BIT

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """The KL divergence from q(x_{T-1} | x_start) to N(0, I), in bits per dimension, [N]. It needs no model."""
        last = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / NATS_PER_BIT

    def calc_bpd_loop(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        progress: bool = False,
        randn_like: Callable[[Tensor], Tensor] = th.randn_like,
    ) -> dict[str, Tensor]:
        """The whole variational bound of images (Ho et al. 2020, eq. 5), with one call of the model per timestep.

        :return: `total_bpd` [N], the bound in bits per dimension: `prior_bpd` [N] plus the sum of `vb`;
            `vb` [N, T], its terms, the noisiest timestep first; `xstart_mse` and `mse` [N, T], in the same order,
            the squared errors of the predicted image and of the predicted noise.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        timesteps = reversed(range(self.num_timesteps))
        for i in tqdm(timesteps, total=self.num_timesteps, disable=not progress):
            t = th.full((len(x_start),), i, device=x_start.device)
            noise = randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with th.no_grad():
                bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            pred_xstart = bound["pred_xstart"]
            eps = self.eps_of(pred_xstart, x_t, t)
            columns["vb"].append(bound["output"])
            columns["xstart_mse"].append(mean_flat((pred_xstart - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        tables = {name: th.stack(column, dim=1) for name, column in columns.items()}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": tables["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **tables}


def rescale_to_thousand(t: Tensor, num_timesteps: int) -> Tensor:
    """Timesteps `t` of a diffusion of `num_timesteps`, multiplied by 1000 / num_timesteps: float32, of t's shape."""
    return t.float() * (1000.0 / num_timesteps)


def _at(coefficients: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """The coefficients [T] at `t` [N], expanded to the shape of `like` [N, ...]; float32, or float64 if `like` is."""
    dtype = th.promote_types(like.dtype, th.float32)
    values = th.from_numpy(coefficients).to(dtype).to(t.device)[t]
    return values.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)


def _not_at_zero(t: Tensor, like: Tensor) -> Tensor:
    """1 where t [N] > 0, and 0 where t = 0; broadcasts with `like` [N, ...]."""
    return (t != 0).float().view(-1, *[1] * (like.dim() - 1))


def _starting_noise(
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None,
    device: th.device | str | None,
    randn_like: Callable[[Tensor], Tensor],
) -> Tensor:
    """`noise`, or fresh noise of `shape`, on `device`; see `p_sample_loop_progressive`."""
    if device is None:
        parameter = next(model.parameters(), None) if isinstance(model, th.nn.Module) else None
        located = parameter if parameter is not None else noise
        device = located.device if located is not None else "cpu"
    if noise is None:
        return randn_like(th.empty(*shape, device=device))
    assert noise.shape == tuple(shape), f"noise {tuple(noise.shape)} is not of shape {tuple(shape)}"
    return noise.to(device)


def _iterate(
    step: Callable[[Tensor, Tensor], dict[str, Tensor]],
    x: Tensor,
    timesteps: Iterator[int] | range,
    total: int,
    progress: bool,
) -> Iterator[dict[str, Tensor]]:
    """Apply `step` at each timestep to the sample of the one before, and yield every result."""
    for i in tqdm(timesteps, total=total, disable=not progress):
        # Around each step, not around the loop: between steps the caller runs, whose gradients must stay on.
        with th.no_grad():
            result = step(x, th.full((len(x),), i, device=x.device))
        yield result
        x = result["sample"]


def _last_sample(results: Iterator[dict[str, Tensor]], start: Tensor | None = None) -> Tensor:
    """The `sample` of the last result; `start` if there is none."""
    sample = start
    for result in results:
        sample = result["sample"]
    return sample
