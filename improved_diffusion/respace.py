"""Respacing: run a diffusion on other timesteps than those its model was trained on, some of them or between them."""

import re
from collections.abc import Collection, Sequence

import numpy as np
import torch as th
from torch import Tensor

from improved_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, rescale_to_thousand


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Choose which of the timesteps 0 .. num_timesteps - 1 to keep (Nichol & Dhariwal 2021, section 4).

    :param section_counts: ``"250"`` spreads 250 timesteps evenly from the first to the last. ``"10,15,20"``, or a
        list of numbers, splits the range into three equal sections with 10, 15 and 20 timesteps.
        ``"ddim50"`` takes 50 timesteps from 0 on, as DDIM does (Song et al. 2020, appendix D.2): every n-th one if
        some n gives exactly 50, otherwise 50 that are as evenly spaced as whole numbers can be.
    :return: exactly as many timesteps as were asked for.
    :raises ValueError: the text is malformed, or asks for more timesteps than there are.
    """
    text = section_counts if isinstance(section_counts, str) else ",".join(map(str, section_counts))
    counts = _parse_counts(text)
    if text.startswith("ddim"):
        count = counts[0]
        if count > num_timesteps:
            raise ValueError(
                f"section_counts {text}: there are {num_timesteps} timesteps to choose from; "
                f"use ddim{num_timesteps} at most"
            )
        stride = -(-num_timesteps // count)
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
        return {i * num_timesteps // count for i in range(count)}

    size, remainder = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        section = size + (i < remainder)
        if count > section:
            raise ValueError(
                f"section_counts {text}: section {i + 1} of {len(counts)} has only {section} of the "
                f"{num_timesteps} timesteps, not {count}; use a smaller number there, or fewer sections"
            )
        kept.update(start + offset for offset in _spread(count, section))
        start += section
    return kept


def _parse_counts(text: str) -> list[int]:
    """The positive numbers in ``"250"``, ``"10,15,20"`` or ``"ddim50"``."""
    counts = [int(number) for number in re.findall("[0-9]{1,9}", text)]
    if not re.fullmatch("ddim[0-9]{1,9}|[0-9]{1,9}( *, *[0-9]{1,9})*", text) or 0 in counts:
        raise ValueError(
            f"section_counts {text!r}: use a number of timesteps (250), one number "
            "per section (10,15,20), or ddim and a number (ddim50); none may be 0"
        )
    return counts


def _spread(count: int, size: int) -> list[int]:
    """`count` whole numbers spread evenly from 0 to `size` - 1 (just 0 when `count` is 1)."""
    stride = (size - 1) / (count - 1) if count > 1 else 0.0
    # The stride is added up, not multiplied, so that ties like 49.5 round to the same timesteps as in
    # improved-diffusion.
    return [round(offset) for offset in np.cumsum([0.0] + [stride] * (count - 1)).tolist()]


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion on some of the timesteps of another (Nichol & Dhariwal 2021, section 4).

    Its betas are such that alpha_bar at the kept timesteps is that of the other diffusion. The model is still given
    the original timesteps.

    :param use_timesteps: the original timesteps to keep.
    :param betas: those of the original diffusion, [original_num_steps].
    :param kwargs: further arguments of `GaussianDiffusion`.

    `timestep_map`, a list of num_timesteps numbers, holds the original timestep of each step, in rising order.
    """

    def __init__(self, use_timesteps: Collection[int], *, betas: np.ndarray, **kwargs):
        self.timestep_map = sorted(set(use_timesteps))
        self.original_num_steps = len(betas)
        assert self.timestep_map, "no timestep is kept"
        assert self.timestep_map[0] >= 0 and self.timestep_map[-1] < self.original_num_steps
        alpha_bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        super().__init__(betas=_betas_between(alpha_bar), **kwargs)

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The original timesteps of the steps `t` [N]: int64, or float32 if the diffusion rescales them."""
        original = th.tensor(self.timestep_map, device=t.device)[t]
        return rescale_to_thousand(original, self.original_num_steps) if self.rescale_timesteps else original


class InterpolatedDiffusion(GaussianDiffusion):
    """A diffusion for sampling, whose steps are at any timesteps of another, also between the whole ones.

    Between them, lambda and the timestep given to the model (a float) are interpolated linearly.

    :param diffusion: the other diffusion.
    :param timesteps: float64 [num_timesteps], rising, from 0 to the last timestep of `diffusion` at most.
    :raises ValueError: the model predicts x_{t-1}, which belongs to the steps that it was trained on.
    """

    def __init__(self, diffusion: GaussianDiffusion, timesteps: np.ndarray):
        if diffusion.model_mean_type is ModelMeanType.PREVIOUS_X:
            raise ValueError(
                "PREVIOUS_X: a model of x_{t-1} knows only the steps that it was trained on; sample with p_sample_loop "
                "or ddim_sample_loop"
            )
        whole = np.arange(diffusion.num_timesteps)
        model_timesteps = diffusion.model_timesteps(th.from_numpy(whole)).double().numpy()
        self._model_timesteps = np.interp(timesteps, whole, model_timesteps)
        lam = np.interp(timesteps, whole, log_signal_to_noise(diffusion))
        super().__init__(
            betas=_betas_between(1 / (1 + np.exp(-2 * lam))),
            model_mean_type=diffusion.model_mean_type,
            model_var_type=diffusion.model_var_type,
            loss_type=diffusion.loss_type,
            sigma_data=diffusion.sigma_data,
        )

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps given to the model at the steps `t` [N], float64."""
        return th.from_numpy(self._model_timesteps).to(t.device)[t]


def log_signal_to_noise(diffusion: GaussianDiffusion) -> np.ndarray:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio: float64 [T], falling."""
    return (np.log(diffusion.alphas_cumprod) - np.log1p(-diffusion.alphas_cumprod)) / 2


def _betas_between(alpha_bar: np.ndarray) -> np.ndarray:
    """The betas [T] of a diffusion whose alpha_bar [T] is given (Nichol & Dhariwal 2021, eq. 19)."""
    # Schedules of about ten steps reach an alpha_bar of 1e-17. If steps are left out there, beta would round to 1.
    return np.minimum(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]), np.nextafter(1.0, 0.0))
