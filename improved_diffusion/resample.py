"""Schedule samplers: they draw the timesteps to train at, and the weights that keep the mean loss unbiased."""

from collections.abc import Sequence

import numpy as np
import torch as th
from torch import Tensor

from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.weighting import SIGMA_MEAN, SIGMA_STD, UNIFORM_SHARE, log_normal_shares

GOLDEN_RATIO = (1 + 5**0.5) / 2


def create_named_schedule_sampler(
    name: str,
    diffusion: GaussianDiffusion,
    sigma_mean: float = SIGMA_MEAN,
    sigma_std: float = SIGMA_STD,
    uniform_share: float = UNIFORM_SHARE,
) -> "UniformSampler | LossSecondMomentResampler | LogNormalSampler":
    """The sampler called `name` for the timesteps of `diffusion`.

    :param name: "uniform", "loss-second-moment" or "log-normal".
    :param sigma_mean, sigma_std, uniform_share: for "log-normal"; see `weighting.log_normal_shares`.
    :raises ValueError: there is no such sampler, or one of the numbers is out of range.
    """
    if name == "log-normal":
        return LogNormalSampler(diffusion, sigma_mean, sigma_std, uniform_share)
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise ValueError(f"schedule sampler {name!r}: use {', '.join(samplers)} or log-normal")
    return samplers[name](diffusion)


class UniformSampler:
    """Draws all timesteps with the same probability. All loss weights are 1."""

    def __init__(self, diffusion: GaussianDiffusion):
        self._num_timesteps = diffusion.num_timesteps

    def weights(self) -> np.ndarray:
        """The relative frequency of each timestep, float64 [T]."""
        return np.ones(self._num_timesteps)

    def sample(
        self, batch_size: int, device: th.device | str, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch of timesteps and their loss weights; see `_draw`."""
        return _draw(self.weights(), batch_size, device, rng)

    def state_dict(self) -> dict:
        """An empty dict: the sampler has no history."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept the state of a sampler without a history.

        :raises ValueError: it is the state of a sampler with a history.
        """
        _refuse_history(state)


class LogNormalSampler:
    """Draws timesteps whose noise is log-normal, and some uniformly (Karras et al. 2022, table 1).

    The batch is stratified: the range of timesteps is cut into as many parts of equal probability as the batch has
    images, and one timestep is drawn from each part. Neighbours in the batch get parts that are far apart, so that
    every microbatch and every process gets timesteps from the whole range: image i gets the part whose number is the
    rank of frac(i * golden ratio) among all i.

    :param sigma_mean, sigma_std, uniform_share: as in `weighting.log_normal_shares`.
    :raises ValueError: one of them is out of range.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        sigma_mean: float = SIGMA_MEAN,
        sigma_std: float = SIGMA_STD,
        uniform_share: float = UNIFORM_SHARE,
    ):
        sigma = diffusion.sqrt_recipm1_alphas_cumprod
        self._shares = log_normal_shares(sigma, sigma_mean, sigma_std, uniform_share)

    def weights(self) -> np.ndarray:
        """The probability of each timestep, float64 [T]."""
        return self._shares

    def sample(
        self, batch_size: int, device: th.device | str, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a stratified batch of timesteps and their loss weights; arguments and results are those of `_draw`."""
        rng = np.random.default_rng() if rng is None else rng
        ranks = np.argsort(np.argsort(np.arange(batch_size) * GOLDEN_RATIO % 1))
        quantiles = (ranks + rng.random(batch_size)) / batch_size
        # Without the last sum: rounding may leave it below 1, and a quantile above it would find no timestep.
        timesteps = np.searchsorted(np.cumsum(self._shares)[:-1], quantiles, side="right")
        return _with_factors(timesteps, self._shares, device)

    def state_dict(self) -> dict:
        """An empty dict: the sampler has no history."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept the state of a sampler without a history.

        :raises ValueError: it is the state of a sampler with a history.
        """
        _refuse_history(state)


class LossSecondMomentResampler:
    """Draws timesteps in proportion to the root mean square of their latest losses (Nichol & Dhariwal 2021, eq. 18).

    It draws uniformly until the history of every timestep is full.

    :param history_per_term: how many of its latest losses the history of a timestep holds.
    :param uniform_prob: the share of uniform draws, so that every timestep is drawn from time to time.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        self._uniform_prob = uniform_prob
        self._losses = np.zeros((diffusion.num_timesteps, history_per_term))  # the latest one last
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        """The relative frequency of each timestep, float64 [T]."""
        num_timesteps, history_per_term = self._losses.shape
        if (self._counts < history_per_term).any():
            return np.ones(num_timesteps)
        root_mean_square = np.sqrt(np.mean(self._losses**2, axis=1))
        share = root_mean_square / root_mean_square.sum()
        return (1 - self._uniform_prob) * share + self._uniform_prob / num_timesteps

    def sample(
        self, batch_size: int, device: th.device | str, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch of timesteps and their loss weights; see `_draw`."""
        return _draw(self.weights(), batch_size, device, rng)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Add losses to the history, in order.

        All processes must pass the losses of all processes, in the same order, so that their histories stay the same.

        :param ts: the timesteps drawn, [N]. :param losses: the loss at each, [N], without its weight.
        """
        assert len(ts) == len(losses)
        for t, loss in zip(ts, losses):
            self._losses[t] = np.append(self._losses[t, 1:], loss)
            self._counts[t] = min(self._counts[t] + 1, self._losses.shape[1])

    def update_with_local_losses(self, ts: Tensor, losses: Tensor) -> None:
        """`update_with_all_losses` for tensors [N], in a training of a single process."""
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    def state_dict(self) -> dict:
        """The history as lists of numbers, which JSON stores exactly."""
        return {"losses": self._losses.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the history that `state_dict` returned.

        :raises ValueError: it is the state of another kind of sampler, or has another shape.
        """
        if not state:
            raise ValueError(
                "schedule_sampler loss-second-moment: needs a history of losses, and this is the state of a uniform "
                "or log-normal sampler"
            )
        losses = np.array(state["losses"], dtype=np.float64)
        counts = np.array(state["counts"], dtype=np.int64)
        if losses.shape != self._losses.shape or counts.shape != self._counts.shape:
            raise ValueError(
                f"diffusion_steps {len(self._losses)}: this history of losses has the shape {losses.shape} (timesteps, "
                f"losses of each); it must be {self._losses.shape}"
            )
        self._losses, self._counts = losses, counts


def _refuse_history(state: dict) -> None:
    if state:
        raise ValueError(
            "schedule_sampler uniform or log-normal: has no history, and this is the state of a loss-second-moment "
            "sampler"
        )


def _draw(
    weights: np.ndarray, batch_size: int, device: th.device | str, rng: np.random.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw timesteps in proportion to `weights` [T].

    :param rng: the source of randomness; by default, one with a random seed.
    :return: timesteps, int64 [batch_size], and their loss weights 1 / (T p_t), float32 [batch_size]. The mean of the
        weighted losses is an unbiased estimate of the mean loss over all timesteps.
    """
    rng = np.random.default_rng() if rng is None else rng
    probabilities = weights / weights.sum()
    timesteps = rng.choice(len(weights), size=batch_size, p=probabilities)
    return _with_factors(timesteps, probabilities, device)


def _with_factors(
    timesteps: np.ndarray, probabilities: np.ndarray, device: th.device | str
) -> tuple[Tensor, Tensor]:
    """The result of `_draw` for timesteps [N] that were drawn with `probabilities` [T]."""
    factors = 1 / (len(probabilities) * probabilities[timesteps])
    return (
        th.as_tensor(timesteps, dtype=th.int64, device=device),
        th.from_numpy(factors).float().to(device),
    )
