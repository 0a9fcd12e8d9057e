"""Held-out loss: how well a model denoises images that it was not trained on, at fixed noise levels.

The training loss says little: its timesteps and noise are drawn anew in every step, and its average is ruled by
levels at which no model can be better. Here images, noise and levels stay the same, so two numbers of one model at two
ages, or of two models, differ only by the models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from improved_diffusion import seeding
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.losses import mean_flat
from improved_diffusion.samplers import log_signal_to_noise
from improved_diffusion.seeding import Purpose

# sqrt((1 - alpha_bar) / alpha_bar): the noise's standard deviation, for images in [-1, 1].
SIGMAS = (0.03, 0.08, 0.2, 0.4, 0.8, 1.6, 4.0, 15.0)
SIGMA_DATA = 0.5  # the standard deviation of natural images in [-1, 1]
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # of the levels that EDM trains at
IMAGES_PER_SIGMA = 64


@dataclass(frozen=True)
class HeldOut:
    """Images to be denoised, and how.

    :ivar images: float32 [N, C, H, W] in [-1, 1]. :ivar labels: int64 [N], for a class-conditional model.
    """

    images: th.Tensor
    labels: th.Tensor | None = None
    batch_size: int = 16


def columns(sigmas: Sequence[float] = SIGMAS) -> list[str]:
    """The names of what `heldout_loss` returns, in order."""
    return ["heldout_loss", *(f"heldout_sigma_{sigma:g}" for sigma in sigmas)]


def choose_images(count: int, wanted: int = IMAGES_PER_SIGMA * len(SIGMAS)) -> np.ndarray:
    """Which of `count` images to denoise: `wanted` at the most, spread evenly, so that all classes are among them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def withhold(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Split a set into what remains and `share` of it, at least one image, spread evenly.

    :raises ValueError: the set has one image only; the message begins with ``share``.
    """
    if len(images) < 2:
        raise ValueError(f"share {share}: of one image, none can be withheld")
    withheld = choose_images(len(images), max(1, round(share * len(images))))
    remaining = np.setdiff1d(np.arange(len(images)), withheld)
    return images.subset(remaining), images.subset(withheld)


@th.no_grad()
def heldout_loss(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    heldout: HeldOut,
    sigmas: Sequence[float] = SIGMAS,
) -> dict[str, float]:
    """The error of the predicted x_start at each of `sigmas`, and their mean.

    The squared error is weighted by (sigma^2 + s^2) / (sigma s)^2 with s = `SIGMA_DATA`: a network that knows nothing
    but mean and variance of the images has 1 at every level (Karras et al. 2022, arXiv 2206.00364, table 1). The mean
    weighs the levels by EDM's density over ln sigma. Image i is denoised at level i mod len(sigmas), with noise that
    depends on i alone. Fewer images than levels are all denoised at every level.

    :param model: as in `gaussian_diffusion`.
    :return: by the names of `columns`; a level that the diffusion does not reach is left out of it.
    """
    known = np.exp(-log_signal_to_noise(diffusion))  # sigma at every timestep, rising
    found, weights = {}, {}
    for number, sigma in enumerate(sigmas):
        if not known[0] / 2 <= sigma <= known[-1] * 2:
            continue
        t = int(np.argmin(np.abs(np.log(known / sigma))))
        chosen = range(number, len(heldout.images), len(sigmas))
        if len(heldout.images) < len(sigmas):
            chosen = range(len(heldout.images))
        errors = []
        for start in range(0, len(chosen), heldout.batch_size):
            part = chosen[start : start + heldout.batch_size]
            errors.append(_errors(model, diffusion, heldout, list(part), t))
        actual = known[t]
        weight = (actual**2 + SIGMA_DATA**2) / (actual * SIGMA_DATA) ** 2
        found[f"heldout_sigma_{sigma:g}"] = weight * th.cat(errors).mean().item()
        weights[f"heldout_sigma_{sigma:g}"] = math.exp(
            -(((math.log(sigma) - LOG_SIGMA_MEAN) / LOG_SIGMA_STD) ** 2) / 2
        )
    total = sum(weights.values())
    if not total:
        return {}
    mean = sum(weights[name] * value for name, value in found.items()) / total
    return {"heldout_loss": mean, **found}


def _errors(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    heldout: HeldOut,
    numbers: list[int],
    t: int,
) -> th.Tensor:
    """The mean squared error of x_start, [n], of the images `numbers` at timestep `t`."""
    x_start = heldout.images[numbers]
    noise = th.stack(
        [seeding.normal(seeding.generator(0, Purpose.NOISE, i), tuple(x_start.shape[1:])) for i in numbers]
    )
    steps = th.full((len(numbers),), t)
    kwargs = {} if heldout.labels is None else {"y": heldout.labels[numbers]}
    x_t = diffusion.q_sample(x_start, steps, noise)
    predicted = diffusion.p_mean_variance(model, x_t, steps, clip_denoised=False, model_kwargs=kwargs)
    return mean_flat((predicted["pred_xstart"] - x_start) ** 2)
