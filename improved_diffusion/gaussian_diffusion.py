"""The Gaussian diffusion process: noise schedules, forward and reverse process, losses, bound, samplers.

Timesteps count from 0 (least noise) to T - 1 (almost only noise). With betas beta_t, alpha_t = 1 - beta_t and
alpha_bar_t = alpha_0 ... alpha_t, the forward process q turns an image x_start into x_t,

    q(x_t | x_start) = N(sqrt(alpha_bar_t) x_start, (1 - alpha_bar_t) I),

and the reverse process p(x_{t-1} | x_t) = N(mean, variance), which the model describes, turns noise into an
image. Below t = 0 there is no noise: "x_{t-1}" at t = 0 is the image itself.

Images are float32 tensors [N, C, H, W] (any shape [N, C, ...] will do) scaled to [-1, 1]; timesteps are int64
[N]. A model is any callable `model(x, timesteps, **model_kwargs)`. It returns a tensor of x's shape, or, when
it learns the variance, one with twice the channels, the second half for the variance.

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

MAX_BETA = 0.999  # a beta of 1 would leave nothing of the image, and infinities in the reverse process
NATS_PER_BIT = math.log(2)


def get_named_beta_schedule(name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas [T] of a schedule, float64.

    ``"linear"``: from 1e-4 to 0.02 in a thousand steps (Ho et al. 2020), scaled so that other numbers of
    steps end at the same noise. ``"cosine"``: Nichol & Dhariwal 2021, eq. 17.

    :raises ValueError: there is no such schedule, or no timestep.
    """
    if num_diffusion_timesteps < 1:
        raise ValueError(f"num_diffusion_timesteps {num_diffusion_timesteps}: must be at least 1")
    if name == "linear":
        scale = 1000 / num_diffusion_timesteps
        betas = np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
        betas[-1] = scale * 0.02  # linspace would leave out the end, the noisy one, when T is 1
        return np.minimum(betas, MAX_BETA)
    if name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda time: math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise ValueError(f"schedule {name!r}: use linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = MAX_BETA
) -> np.ndarray:
    """The betas [T] that make the share of signal follow `alpha_bar`, a falling function on [0, 1].

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
    EDM = (
        enum.auto()
    )  # F, which with x_t makes up x_start (Karras et al. 2022, eq. 7); see `GaussianDiffusion`


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # that of q(x_{t-1} | x_t, x_start): right if all images were the same
    FIXED_LARGE = enum.auto()  # beta_t: right if images were noise
    LEARNED_RANGE = enum.auto()  # the model predicts where between these two it lies


class LossType(enum.Enum):
    """What training minimizes."""

    MSE = enum.auto()  # squared error of the prediction, plus the bound if the variance is learned
    RESCALED_MSE = enum.auto()  # the same, with the bound's weight such that it does not drown the error
    KL = enum.auto()  # the variational bound, per timestep
    RESCALED_KL = enum.auto()  # the same times T: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """A diffusion process with T = len(betas) steps.

    :param betas: the variance that each step adds, [T], strictly between 0 and 1.
    :param rescale_timesteps: whether the model is told timesteps on a scale from 0 to 1000, whatever T is.
    :param sigma_data: standard deviation of the images, for EDM. Its model is given x_t / q, of variance 1, and its
        answer F means x_start = (alpha sigma_data^2 / q^2) x_t + (sigma sigma_data / q) F, where q^2 = sigma^2 +
        alpha^2 sigma_data^2, alpha^2 = alpha_bar and sigma^2 = 1 - alpha_bar. That is Karras et al. 2022, table 1,
        whose x is x_t / alpha and whose sigma is sigma / alpha. With sigma_data 1, q is 1 and F is -v.
    :param loss_weighting: gives the weight [T] of the squared error of x_start for the noise sigma / alpha [T] of the
        timesteps; see `weighting`. None: the error of what the model predicts counts alike at all timesteps.
    :raises ValueError: there is a weighting, but the loss is no squared error.

    The attributes that hold coefficients (`alphas_cumprod`, ...) are float64 arrays [T].
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

        # At t = 0, where x_t leads to x_start itself, the variance is 0: its logarithm is taken from t = 1.
        first_variance = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first_variance, self.posterior_variance[1:]))
        self._fixed_large_log_variance = np.log(np.append(first_variance, betas[1:]))
        self._relate_prediction_to_x_start()
        self.loss_weighting = loss_weighting
        if loss_weighting is not None:
            if loss_type.is_vb():
                raise ValueError(
                    "loss_weighting: weighs squared errors, and a variational bound (use_kl) has none"
                )
            # An error of the prediction is one of x_start, times this.
            factor = self._x_start_from_prediction
            self._mse_weight = loss_weighting(self.sqrt_recipm1_alphas_cumprod) * factor**2

    def _relate_prediction_to_x_start(self) -> None:
        """Set the coefficients of what the model predicts, each [T]:

        x_start = `_x_start_from_x` x_t + `_x_start_from_prediction` prediction, and, with VELOCITY and EDM,
        prediction = `_prediction_from_noise` noise + `_prediction_from_x_start` x_start.
        """
        alpha, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        if self.model_mean_type is ModelMeanType.EPSILON:
            from_x, from_prediction = self.sqrt_recip_alphas_cumprod, -self.sqrt_recipm1_alphas_cumprod
        elif self.model_mean_type is ModelMeanType.START_X:
            from_x, from_prediction = np.zeros_like(alpha), np.ones_like(alpha)
        elif self.model_mean_type is ModelMeanType.PREVIOUS_X:
            # the image for which q(x_{t-1} | x_t, x_start) has the predicted mean
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
        """Draw x_t from q(x_t | x_start).

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

        Each is of x_t's shape. At t = 0 the variance is 0 and the log-variance that of t = 1.
        """
        return (
            _at(self.posterior_mean_coef1, t, x_t) * x_start + _at(self.posterior_mean_coef2, t, x_t) * x_t,
            _at(self.posterior_variance, t, x_t),
            _at(self.posterior_log_variance_clipped, t, x_t),
        )

    # The reverse process p

    def model_timesteps(self, t: Tensor) -> Tensor:
        """What the model is told at the steps `t` [N]: `t` itself, or rescaled as float32."""
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
        """The reverse step p(x_{t-1} | x_t) and the image that the model sees in x_t.

        :param x: x_t.
        :param clip_denoised: whether the predicted image is clipped to [-1, 1].
        :param denoised_fn: applied to the predicted image, before it is clipped.
        :param model_kwargs: further arguments of the model, such as the labels `y`.
        :return: `mean`, `variance`, `log_variance` and `pred_xstart`, each of x's shape. With FIXED_SMALL,
            the variance at t = 0 is 0 and the log-variance that of t = 1.
        """
        prediction, variance_values = self.predict(model, x, t, model_kwargs)
        return self._reverse_step(prediction, variance_values, x, t, clip_denoised, denoised_fn)

    def predict(
        self, model: Callable[..., Tensor], x: Tensor, t: Tensor, model_kwargs: dict | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The model's prediction and, if it learns the variance, its values for that; both of x's shape.

        :param x: x_t. The work is done in its precision, and at least in 32 bits.
        """
        dtype = th.promote_types(x.dtype, th.float32)
        told = self.model_timesteps(t)
        told = told.to(dtype) if told.is_floating_point() else told
        scaled = x * _at(self._input_scale, t, x) if self.model_mean_type is ModelMeanType.EDM else x
        output = model(scaled, told, **(model_kwargs or {})).to(dtype)
        variance_values = None
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, variance_values = output.chunk(2, dim=1)
        assert output.shape == x.shape, "the model's output channels do not fit the variance type"
        return output, variance_values

    def predicted_x_start(
        self,
        prediction: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The image that the model's `prediction` at x = x_t stands for, whatever it predicts.

        The arguments are those of `p_mean_variance`.
        """
        x_start = _at(self._x_start_from_x, t, x) * x + _at(self._x_start_from_prediction, t, x) * prediction
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        return x_start.clamp(-1, 1) if clip_denoised else x_start

    def eps_of(self, x_start: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x = x_t of the image `x_start`."""
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
        """`p_mean_variance` from what the model has returned."""
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

        :param variance_values: what the model says about it, if it learns it.
        """
        if self.model_var_type is ModelVarType.LEARNED:
            return variance_values
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            return _at(self._fixed_large_log_variance, t, x)
        smallest = _at(self.posterior_log_variance_clipped, t, x)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return smallest
        # Nichol & Dhariwal 2021, eq. 15; the model's values run from -1 to 1
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
        """Draw x_{t-1} from p(x_{t-1} | x_t) (Ho et al. 2020, algorithm 2); at t = 0 its mean.

        :param randn_like: draws the noise, given a tensor of the shape wanted, so that each image can have
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
        """Draw images of `shape`, by ancestral sampling from pure noise.

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
        """Ancestral sampling, yielding what `p_sample` returns after each of the T steps.

        :param shape: of the images, [N, C, H, W].
        :param noise: what to start from; drawn when not given.
        :param device: where to compute; by default where the model is, else the noise, else on the CPU.
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

        :param eta: how random the step is: 0 not at all; 1 is ancestral sampling with FIXED_SMALL. The other
            arguments are those of `p_sample`.
        :return: `sample` and `pred_xstart`, of x's shape.
        :raises ValueError: eta is not between 0 and 1.
        """
        if not 0 <= eta <= 1:
            raise ValueError(
                f"eta is {eta}; DDIM needs a value from 0 (deterministic) to 1 (ancestral sampling)"
            )
        step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = _not_at_zero(t, x) * randn_like(x)
        sample = self.ddim_move(x, t, step["pred_xstart"], eta, noise)
        return {"sample": sample, "pred_xstart": step["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """Go from x_t to x_{t+1} by the deterministic DDIM, against the direction of sampling.

        This is Euler's method on the ODE of Song et al. 2020, eq. 14. After t = T - 1 comes pure noise.
        The arguments are those of `p_mean_variance`.

        :return: `sample` and `pred_xstart`, of x's shape.
        """
        step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        no_variance = np.zeros(self.num_timesteps)
        sample = self._mix_anew(x, t, step["pred_xstart"], self.alphas_cumprod_next, no_variance)
        return {"sample": sample, "pred_xstart": step["pred_xstart"]}

    def ddim_move(
        self, x: Tensor, t: Tensor, pred_xstart: Tensor, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """x_{t-1} by DDIM, from x = x_t and the image seen in it: keep that image, and all noise but what is replaced.

        :param noise: what replaces it, standard normal, of x's shape; needed when `eta` is not 0.
        """
        # sigma_t of eq. 16: eta = 1 is exactly the variance of q(x_{t-1} | x_t, x_start)
        variance = eta**2 * self.posterior_variance
        sample = self._mix_anew(x, t, pred_xstart, self.alphas_cumprod_prev, variance)
        return sample if noise is None else sample + _at(np.sqrt(variance), t, x) * noise

    def _mix_anew(
        self, x: Tensor, t: Tensor, pred_xstart: Tensor, alpha_bar: np.ndarray, variance: np.ndarray
    ) -> Tensor:
        """Mix image and noise of x_t anew at level `alpha_bar`, with room for `variance` of fresh noise."""
        eps = self.eps_of(pred_xstart, x, t)
        old_noise = np.sqrt(np.maximum(1 - alpha_bar - variance, 0))
        return _at(np.sqrt(alpha_bar), t, x) * pred_xstart + _at(old_noise, t, x) * eps

    def ddim_sample_loop(
        self, model: Callable[..., Tensor], shape: Sequence[int], noise: Tensor | None = None, **options
    ) -> Tensor:
        """Draw images of `shape` by DDIM, from pure noise.

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
        """DDIM sampling, yielding what `ddim_sample` returns after each of the T steps.

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
        """The noise from which `ddim_sample_loop` with eta 0 makes (almost) the image `x_start`.

        The more timesteps, the closer it comes. The arguments are those of `p_sample_loop_progressive`.
        """
        step = partial(
            self.ddim_reverse_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        # Sampling starts at level T - 1, so the way there ends one step before pure noise.
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
        :return: `loss` [N], to be minimized. With the MSE losses also `mse` [N], of what the model predicts, and
            `vb` [N] when the variance is learned; then loss = mse + vb (Nichol & Dhariwal 2021, eq. 16). With a
            `loss_weighting`, mse has its weight in `loss`, and vb is as it is.
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

        # The bound is there for the variance only: what it would say about the mean is noisier than the MSE.
        step = self._reverse_step(prediction.detach(), variance_values, x_t, t, clip_denoised=False)
        # In RESCALED_MSE the whole bound, T times its term, weighs a thousandth.
        scale = self.num_timesteps / 1000 if self.loss_type is LossType.RESCALED_MSE else 1
        vb = scale * self._bound_of_step(step, x_start, x_t, t)
        return {"mse": mse, "vb": vb, "loss": weighted + vb}

    def _target(self, x_start: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What the model should predict."""
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
        """Bits per dimension [N]: KL to the true posterior, or, at t = 0, -log of the pixels' likelihood."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, step["mean"], step["log_variance"])
        likelihood = discretized_gaussian_log_likelihood(
            x_start, means=step["mean"], log_scales=0.5 * step["log_variance"]
        )
        return th.where(t == 0, mean_flat(-likelihood), mean_flat(kl)) / NATS_PER_BIT

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL between q(x_{T-1} | x_start) and N(0, I): [N], bits per dimension. No model can change it."""
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
        """The whole variational bound of images, one evaluation of the model per timestep.

        :return: `total_bpd` [N], the bound in bits per dimension: `prior_bpd` [N] plus the sum of `vb`;
            `vb` [N, T], its terms, the noisiest timestep first; `xstart_mse` and `mse` [N, T], the squared
            errors of the predicted image and the predicted noise, likewise.
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
    """Timesteps of a diffusion of `num_timesteps`, as float32 on a scale from 0 to 1000."""
    return t.float() * (1000.0 / num_timesteps)


def _at(coefficients: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """The coefficients [T] at `t` [N], in 32 bits or `like`'s precision, spread to the shape of `like` [N, ...]."""
    dtype = th.promote_types(like.dtype, th.float32)
    values = th.from_numpy(coefficients).to(dtype).to(t.device)[t]
    return values.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)


def _not_at_zero(t: Tensor, like: Tensor) -> Tensor:
    """1 where t [N] > 0 and 0 where the step leads to the image itself; broadcasts with `like` [N, ...]."""
    return (t != 0).float().view(-1, *[1] * (like.dim() - 1))


def _starting_noise(
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None,
    device: th.device | str | None,
    randn_like: Callable[[Tensor], Tensor],
) -> Tensor:
    """`noise`, or fresh noise of `shape`, on the device where sampling is to happen."""
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
    """Apply `step` at each timestep to the sample of the one before, yielding every result."""
    for i in tqdm(timesteps, total=total, disable=not progress):
        # Inside the loop, because a generator must not keep gradients off while its caller has control.
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
