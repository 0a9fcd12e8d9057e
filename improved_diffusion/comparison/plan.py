"""Which samplers to compare, in how many steps each, and with what."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from improved_diffusion.config import ComparingConfig
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.sample_util import Plan, suitable_spacing
from improved_diffusion.samplers import SAMPLERS, SPACINGS, WITH_ETA

BASELINE = Plan("ddpm", None, "uniform")
EXACT = Plan("unipc", 200, "logsnr")  # further steps change no image visibly
EXACT_IMAGES = 64  # of each seed; drawing them exactly takes long


class Solver(NamedTuple):
    """A sampler with its spacing and eta."""

    sampler: str
    spacing: str
    eta: float = 0.0

    def __str__(self) -> str:
        return self.sampler + (f", eta {self.eta:g}" if self.eta else "")

    def plan(self, steps: int) -> Plan:
        """The plan of this sampler with `steps` steps."""
        return Plan(self.sampler, steps, self.spacing, self.eta)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    :ivar samplers: with their spacings.
    :ivar steps: numbers of steps, in ascending order.
    :ivar seeds: of the images.
    :ivar images: number of images for each seed.
    :ivar baseline: whether `BASELINE` is compared too.
    """

    samplers: list[Solver]
    steps: list[int]
    seeds: list[int]
    images: int
    baseline: bool

    def plans(self) -> list[Plan]:
        """Every way to draw the images, the slowest last."""
        plans = [solver.plan(n) for n in self.steps for solver in self.samplers]
        return plans + [BASELINE] * self.baseline

    @property
    def exact_images(self) -> int:
        """How many images of each seed are compared with the exact ones."""
        return min(self.images, EXACT_IMAGES)

    def check_steps(self, timesteps: int) -> None:
        """:raises ValueError: a number of steps is larger than the model's number of timesteps."""
        for steps in self.steps:
            if not 1 <= steps <= timesteps:
                raise ValueError(
                    f"--steps {steps}: use 1 to {timesteps}, the number of timesteps of this model"
                )


def parse_comparison(config: ComparingConfig, diffusion: GaussianDiffusion) -> Comparison:
    """What the flags ask for. :raises ValueError: naming a flag that is wrong."""
    seeds = _parse_numbers(config.seeds, "seeds")
    for seed in seeds:
        if abs(seed) >= 2**63:
            raise ValueError(f"--seeds {seed}: is too large")
    return Comparison(
        _parse_samplers(config.samplers, config.timestep_spacing, diffusion),
        sorted(_parse_numbers(config.steps, "steps")),
        seeds,
        config.num_samples,
        config.baseline,
    )


def _parse_samplers(text: str, spacing: str, diffusion: GaussianDiffusion) -> list[Solver]:
    solvers = []
    for part in text.split(","):
        sampler, own, eta_text = [*part.strip().split(":", 2), "", ""][:3]
        if sampler not in SAMPLERS:
            raise ValueError(f"--samplers {sampler!r}: expected some of {', '.join(SAMPLERS)}")
        try:
            eta = float(eta_text) if eta_text else Plan(sampler).eta
        except ValueError:
            eta = -1.0
        if not 0 <= eta <= (sampler in WITH_ETA):
            raise ValueError(
                f"--samplers {part!r}: eta, for {' and '.join(WITH_ETA)} only, is a number from 0 to 1"
            )
        chosen = own or spacing or suitable_spacing(sampler, eta, diffusion)
        if chosen not in SPACINGS:
            flag = "samplers" if own else "timestep_spacing"
            raise ValueError(f"--{flag} {chosen!r}: a spacing is one of {', '.join(SPACINGS)}")
        solvers.append(Solver(sampler, chosen, eta))
    return list(dict.fromkeys(solvers))


def _parse_numbers(text: str, flag: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--{flag} {text!r}: expected whole numbers, separated by commas") from None


def exact_plan(timesteps: int) -> Plan:
    """The plan that solves the ODE almost exactly, for a model with this many timesteps."""
    return replace(EXACT, steps=min(EXACT.steps, timesteps))


def cell_name(plan: Plan, seed: int) -> str:
    """The name of the images of a plan and a seed, and of their measurements."""
    sampler = plan.sampler + (f"-eta{plan.eta:g}" if plan.eta else "")
    way = f"{sampler}-{plan.spacing}-{plan.steps}" if plan.steps else f"{sampler}-all"
    return f"{way}-seed{seed}"


def difference(images: np.ndarray, others: np.ndarray) -> float:
    """The root mean square difference of two arrays of images, uint8 [N, S, S, 3], in grey levels (of 255)."""
    return float(np.sqrt(np.square(images.astype(np.float64) - others).mean()))
