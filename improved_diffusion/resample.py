"""Schedule samplers: which timesteps to train at, and the weights that keep the loss unbiased."""

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
    """The sampler called `name`, for the timesteps of `diffusion`.

    :param sigma_mean, sigma_std, uniform_share: of "log-normal"; see `weighting.log_normal_shares`.
    :raises ValueError: there is no such sampler, or a number is impossible.
    """
    if name == "log-normal":
        return LogNormalSampler(diffusion, sigma_mean, sigma_std, uniform_share)
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise ValueError(f"schedule sampler {name!r}: use {', '.join(samplers)} or log-normal")
    return samplers[name](diffusion)


class UniformSampler:
    """Every timestep equally often; all weights are 1."""

    def __init__(self, diffusion: GaussianDiffusion):
        self._num_timesteps = diffusion.num_timesteps

    def weights(self) -> np.ndarray:
        """How often each timestep is drawn, up to a common factor: [T], float64."""
        return np.ones(self._num_timesteps)

    def sample(
        self, batch_size: int, device: th.device | str, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch of timesteps and their loss weights; see `_draw`."""
        return _draw(self.weights(), batch_size, device, rng)

    def state_dict(self) -> dict:
        """Nothing: the sampler has no memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept the state of a sampler without memory.

        :raises ValueError: it is another sampler's.
        """
        _refuse_history(state)


class LogNormalSampler:
    """Timesteps whose noise is log-normal, and some uniform ones: where most is to be learned (Karras et al. 2022).

    Each batch covers the whole range: it is cut into as many parts of equal share as there are images, and each part
    is drawn from once. Neighbours in the batch lie far apart, so that microbatches and the processes' shares cover it
    too: in order of their noise, image i has the rank that the fractional part of i times the golden ratio has.

    :param sigma_mean, sigma_std, uniform_share: as in `weighting.log_normal_shares`.
    :raises ValueError: one of them is impossible.
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
        """The share of each timestep: [T], float64."""
        return self._shares

    def sample(
        self, batch_size: int, device: th.device | str, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch of timesteps and their loss weights, as `_draw` does, but one from each part of the range."""
        rng = np.random.default_rng() if rng is None else rng
        ranks = np.argsort(np.argsort(np.arange(batch_size) * GOLDEN_RATIO % 1))
        quantiles = (ranks + rng.random(batch_size)) / batch_size
        # The last sum may lie below 1 by rounding, and no quantile may fall beyond it.
        timesteps = np.searchsorted(np.cumsum(self._shares)[:-1], quantiles, side="right")
        return _with_factors(timesteps, self._shares, device)

    def state_dict(self) -> dict:
        """Nothing: the sampler has no memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Accept the state of a sampler without memory.

        :raises ValueError: it is another sampler's.
        """
        _refuse_history(state)


class LossSecondMomentResampler:
    """Timesteps in proportion to the root mean square of their latest losses.

    Nichol & Dhariwal 2021, eq. 18. Uniform until every timestep has a full history.

    :param history_per_term: how many of the latest losses of each timestep are remembered.
    :param uniform_prob: the share of draws that stays uniform, so that no timestep is ever forgotten.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        self._uniform_prob = uniform_prob
        self._losses = np.zeros((diffusion.num_timesteps, history_per_term))  # the latest one last
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        """How often each timestep is drawn, up to a common factor: [T], float64."""
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
        """Remember one loss per timestep drawn, in order.

        With several processes each passes all processes' losses in the same order, so that they stay alike.
        """
        assert len(ts) == len(losses)
        for t, loss in zip(ts, losses):
            self._losses[t] = np.append(self._losses[t, 1:], loss)
            self._counts[t] = min(self._counts[t] + 1, self._losses.shape[1])

    def update_with_local_losses(self, ts: Tensor, losses: Tensor) -> None:
        """The same from tensors [N], for a single process."""
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    def state_dict(self) -> dict:
        """The history as plain lists: JSON keeps it exactly."""
        return {"losses": self._losses.tolist(), "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from the history that `state_dict` gave.

        :raises ValueError: it is another sampler's, or for another number of timesteps.
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
                f"diffusion_steps {len(self._losses)}: this history of losses is of shape {losses.shape} (timesteps, "
                f"losses of each), and not {self._losses.shape}"
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

    :param rng: makes the draw a pure function of its state and `weights`; without it nothing is seeded.
    :return: timesteps [batch_size], int64, and the factors 1 / (T p_t) [batch_size], float32, by which their
        losses are to be multiplied so that the mean estimates the uniform mean over all timesteps.
    """
    rng = np.random.default_rng() if rng is None else rng
    probabilities = weights / weights.sum()
    timesteps = rng.choice(len(weights), size=batch_size, p=probabilities)
    return _with_factors(timesteps, probabilities, device)


def _with_factors(
    timesteps: np.ndarray, probabilities: np.ndarray, device: th.device | str
) -> tuple[Tensor, Tensor]:
    """What `_draw` returns, for timesteps [N] drawn with `probabilities` [T]."""
    factors = 1 / (len(probabilities) * probabilities[timesteps])
    return (
        th.as_tensor(timesteps, dtype=th.int64, device=device),
        th.from_numpy(factors).float().to(device),
    )
