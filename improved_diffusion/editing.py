"""Editing images: drawing that sets off from an image (SDEdit), or keeps a part of it (RePaint).

Meng et al. 2021: "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", arXiv 2108.01073.
Lugmayr et al. 2022: "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", arXiv 2201.09865.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch as th
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """What drawing is to make of images.

    :ivar images: [N, C, H, W] in [-1, 1].
    :ivar strength: above 0, up to 1: the share of the timesteps whose noise is added to the images before drawing. With
        1, drawing begins at pure noise, and nothing of the images is left but what `mask` keeps.
    :ivar mask: bool [H, W]: True where pixels are drawn anew, False where they are kept. None: all are drawn.
    :ivar rounds: how often each step is taken, with a `mask` (RePaint's resampling, U in algorithm 1; its jumps
        have length 1). After each but the last time, the noise of the step is added again. So the part that is drawn
        gets to fit the part that is kept.
    """

    images: Tensor
    strength: float = 1.0
    mask: Tensor | None = None
    rounds: int = 1

    def levels(self, timesteps: np.ndarray, num_timesteps: int) -> np.ndarray:
        """The levels of a path that begins at timestep round(strength * `num_timesteps`), counted from 1.

        :param timesteps: of the levels of a whole path, falling. The nearest one is moved to the beginning; the noisier
            ones are left out.
        """
        if self.strength == 1:
            return timesteps
        first = min(max(round(self.strength * num_timesteps), 1) - 1, timesteps[0])
        nearest = int(np.argmin(np.abs(timesteps - first)))
        return np.append(first, timesteps[nearest + 1 :])

    def departures(self, levels: int) -> Iterator[tuple[int, bool]]:
        """The levels from which a step sets off, by number, and whether it will be taken again."""
        rounds = 1 if self.mask is None else self.rounds
        for i in range(levels - 1):
            for left in reversed(range(rounds)):
                yield i, left > 0

    def steps(self, levels: int) -> int:
        """The number of steps on a path of this many `levels`."""
        return sum(1 for _ in self.departures(levels)) + 1

    def noised(self, alpha: float, sigma: float, noise: Tensor) -> Tensor:
        """The images at a level."""
        return alpha * self.images.to(noise) + sigma * noise

    def begin(self, alpha: float, sigma: float, noise: Tensor) -> Tensor:
        """x at the first level (SDEdit, algorithm 1), where `noise` is standard normal [N, C, H, W]."""
        noised = self.noised(alpha, sigma, noise)
        return noised if self.strength < 1 else self.merge(noise, noised)

    def merge(self, drawn: Tensor, kept: Tensor) -> Tensor:
        """`drawn` where pixels are drawn, `kept` where they are kept (RePaint, eq. 8c)."""
        return drawn if self.mask is None else th.where(self.mask.to(drawn.device), drawn, kept)
