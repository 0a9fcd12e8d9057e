"""Samplers that need few steps: solvers of the way from noise to image, and the levels at which they stop.

Notation of Lu et al. 2022. At every level an image x_0 and standard normal noise eps are mixed to

    x = alpha x_0 + sigma eps,  alpha^2 + sigma^2 = 1,  lambda = log(alpha / sigma),  h = lambda' - lambda,

where a prime marks the next, less noisy level; alpha^2 is the alpha_bar of `gaussian_diffusion`. A model of x_0
(and so of eps, by the mixture above) defines the probability-flow ODE of Song et al. 2021, along which

    d(x / alpha) = eps d(sigma / alpha),    d(x / sigma) = x_0 d(alpha / sigma):

if eps, or x_0, did not change, a step of any length would be exact. A solver differs from the others in how it
foresees the change. It is a generator that takes a `Path` and the noise at its first level, and yields, for each
level that it reaches, x there and the predicted x_0 with which it set off. At the last level, that of timestep 0,
x_0 itself is the result, whatever the solver.

Ho et al. 2020: "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
Song et al. 2020: "Denoising Diffusion Implicit Models" (DDIM), arXiv 2010.02502.
Song et al. 2021: "Score-Based Generative Modeling through Stochastic Differential Equations", arXiv 2011.13456.
Liu et al. 2022: "Pseudo Numerical Methods for Diffusion Models on Manifolds" (PNDM), arXiv 2202.09778.
Zhang & Chen 2022: "Fast Sampling of Diffusion Models with Exponential Integrator" (DEIS), arXiv 2204.13902.
Karras et al. 2022: "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.
Lu et al. 2022: "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv 2211.01095.
Zhao et al. 2023: "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
arXiv 2302.04867.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch as th
from torch import Tensor

from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.respace import InterpolatedDiffusion, log_signal_to_noise, space_timesteps

Moves = Iterator[tuple[Tensor, Tensor]]  # x at the next level, and the x_0 before it
Known = list[tuple[int, Tensor]]  # levels and the values found there, the newest first

# Below this lambda nothing is left of the image (Lu et al. 2022), and steps spent there are lost: the cosine
# schedule has a third of its range of lambda there, in its last timesteps of a thousand. At the very last, 1 / alpha
# is 20,000, and so is the factor of whatever error a model of eps makes.
NOISIEST_LAMBDA = -5.1

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
GAUSS_NODES, GAUSS_WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2  # quadrature on [0, 1]


class Path:
    """The levels from noise to image and the model's view at each: all that a solver knows.

    :param model, diffusion, clip_denoised, model_kwargs, eta, randn_like: as in `sample_progressive`.
    :param timesteps: of the levels, falling; they may lie between whole ones.

    `alpha`, `sigma` and `lam` (lambda) hold a number per level. `diffusion` is the one between the levels.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        diffusion: GaussianDiffusion,
        timesteps: np.ndarray,
        *,
        clip_denoised: bool,
        model_kwargs: dict | None,
        eta: float,
        randn_like: Callable[[Tensor], Tensor],
    ):
        self.steps = len(timesteps)
        self.eta = eta
        self.randn_like = randn_like
        self.diffusion = InterpolatedDiffusion(diffusion, timesteps[::-1])
        self._model = model
        self._model_kwargs = model_kwargs
        self._clip_denoised = clip_denoised
        self.lam: list[float] = log_signal_to_noise(self.diffusion)[::-1].tolist()
        self.alpha: list[float] = self.diffusion.sqrt_alphas_cumprod[::-1].tolist()
        self.sigma: list[float] = self.diffusion.sqrt_one_minus_alphas_cumprod[::-1].tolist()

    def timestep(self, x: Tensor, i: int) -> Tensor:
        """Level i as a timestep of `diffusion`, for each image in x."""
        return th.full((len(x),), self.steps - 1 - i, device=x.device)

    def denoise(self, x: Tensor, i: int) -> Tensor:
        """The x_0 that the model sees in x at level i."""
        return self.predict(x, i)[0]

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
        """`denoise`, and the model's values for the variance, where it learns that."""
        t = self.timestep(x, i)
        prediction, variance_values = self.diffusion.predict(self._model, x, t, self._model_kwargs)
        return self.diffusion.predicted_x_start(prediction, x, t, self._clip_denoised), variance_values

    def eps(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """The noise that makes x of `x0` at level i."""
        return self.diffusion.eps_of(x0, x, self.timestep(x, i))

    def order(self, highest: int, i: int) -> int:
        """The order of a multistep solver's step from level i: as many levels as there are before and after."""
        return min(highest, i + 1, self.steps - i)


def ddpm(path: Path, x: Tensor) -> Moves:
    """Ancestral sampling: draw x' from p(x' | x) (Ho et al. 2020, algorithm 2)."""
    for i in range(path.steps - 1):
        t = path.timestep(x, i)
        x0, variance_values = path.predict(x, i)
        mean, _, _ = path.diffusion.q_posterior_mean_variance(x0, x, t)
        deviation = (path.diffusion.log_variance(variance_values, x, t) / 2).exp()
        x = mean + deviation * path.randn_like(x)
        yield x, x0


def ddim(path: Path, x: Tensor) -> Moves:
    """DDIM (Song et al. 2020, eq. 12 and 16): keep x_0, and all of eps that fresh noise does not replace."""
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        noise = path.randn_like(x) if path.eta else None
        x = path.diffusion.ddim_move(x, path.timestep(x, i), x0, path.eta, noise)
        yield x, x0


def heun(path: Path, x: Tensor) -> Moves:
    """Heun's method in x / alpha over sigma / alpha, whose slope is eps (Karras et al. 2022, algorithm 1).

    It looks at both ends of a step, which takes a model call for each.
    """
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        eps = path.eps(x, x0, i)
        euler = path.alpha[i + 1] * x0 + path.sigma[i + 1] * eps
        next_x0 = path.denoise(euler, i + 1)
        if path.lam[i] < NOISIEST_LAMBDA:
            # sigma / alpha can start at 20,000: times that, the least difference between the slopes is fatal.
            x = _follow_x0(path, i, x, (x0 + next_x0) / 2)
        else:
            x = _follow_eps(path, i, x, (eps + path.eps(euler, next_x0, i + 1)) / 2)
        yield x, x0


def dpmpp_2m(path: Path, x: Tensor) -> Moves:
    """DPM-Solver++(2M): x_0 foreseen on the line through two values (Lu et al. 2022, algorithm 2)."""
    return _dpmpp(path, x, order=2)


def dpmpp_3m(path: Path, x: Tensor) -> Moves:
    """DPM-Solver++(3M): x_0 foreseen on the parabola through three values (Lu et al. 2022, section 4).

    The whole parabola: diffusers takes half of its curvature, which leaves order 2.
    """
    return _dpmpp(path, x, order=3)


def sde_dpmpp_2m(path: Path, x: Tensor) -> Moves:
    """SDE-DPM-Solver++(2M): DPM-Solver++(2M) with noise that is replaced (Lu et al. 2022).

    In a step of length h in lambda, all noise but e^(-2 eta h) of its variance is replaced by fresh noise. With eta 1
    this solves the diffusion SDE; with eta 0, the ODE, as DPM-Solver++(2M) does.
    """
    known: Known = []
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        known = [(i, x0), *known[:1]]
        foreseen = _foresee_x0(path, i, known[: path.order(2, i)])
        h = path.lam[i + 1] - path.lam[i]
        kept = path.sigma[i + 1] / path.sigma[i] * math.exp(-path.eta * h)
        x = kept * x + (path.alpha[i + 1] - kept * path.alpha[i]) * foreseen
        if path.eta:
            fresh = path.sigma[i + 1] * math.sqrt(-math.expm1(-2 * path.eta * h))
            x = x + fresh * path.randn_like(x)
        yield x, x0


def _dpmpp(path: Path, x: Tensor, order: int) -> Moves:
    known: Known = []
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        known = [(i, x0), *known[: order - 1]]
        x = _follow_x0(path, i, x, _foresee_x0(path, i, known[: path.order(order, i)]))
        yield x, x0


def unipc(path: Path, x: Tensor) -> Moves:
    """UniPC of order 3, for x_0 and with B(h) = e^h - 1 (Zhao et al. 2023, sections 3.1 to 3.3).

    The value at a new level serves twice: first to correct the step that led there, then to go on.
    """
    known: Known = []
    start, order = x, 0
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        if i > 0:
            x = _follow_x0(path, i - 1, start, _foresee_x0(path, i - 1, [(i, x0), *known[:order]]))
        start, order = x, path.order(3, i)
        known = [(i, x0), *known[:2]]
        x = _follow_x0(path, i, start, _foresee_x0(path, i, known[:order]))
        yield x, x0


def deis(path: Path, x: Tensor) -> Moves:
    """DEIS of order 3: eps foreseen on a parabola in lambda (Zhang & Chen 2022, eq. 14 and 15).

    The paper's polynomials are in time (tAB) or in sigma / alpha (rhoAB); lambda is the choice of diffusers.
    """
    known: Known = []
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        known = [(i, path.eps(x, x0, i)), *known[:2]]
        x = _follow_eps(path, i, x, _mean_ahead(path, i, known[: path.order(3, i)], exponent=-1))
        yield x, x0


ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(path: Path, x: Tensor) -> Moves:
    """PNDM that starts at low order: DDIM's step with Adams and Bashforth's eps (Liu et al. 2022, section 3).

    Their weights are those of even steps, whatever the spacing, which leaves order 2.
    """
    past: list[Tensor] = []
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        past = [path.eps(x, x0, i), *past[:3]]
        weights = ADAMS_BASHFORTH[path.order(4, i) - 1]
        x = _follow_eps(path, i, x, sum(weight * eps for weight, eps in zip(weights, past)))
        yield x, x0


def _follow_eps(path: Path, i: int, x: Tensor, eps: Tensor) -> Tensor:
    """x at level i + 1, if eps were `eps` all the way from level i."""
    ratio = path.alpha[i + 1] / path.alpha[i]
    return ratio * x + (path.sigma[i + 1] - ratio * path.sigma[i]) * eps


def _follow_x0(path: Path, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """x at level i + 1, if x_0 were `x0` all the way from level i."""
    ratio = path.sigma[i + 1] / path.sigma[i]
    return ratio * x + (path.alpha[i + 1] - ratio * path.alpha[i]) * x0


def _foresee_x0(path: Path, i: int, known: Known) -> Tensor:
    """The x_0 that leads best from level i to level i + 1.

    Between two known values both papers take the line halfway, which is as good as the exact mean to its order.
    """
    return _mean_ahead(path, i, known, exponent=1 if len(known) > 2 else 0)


def _mean_ahead(path: Path, i: int, known: Known, exponent: int) -> Tensor:
    """The mean from level i to level i + 1, weighted by e^(exponent lambda), of a polynomial in lambda.

    With the right exponent, 1 for x_0 and -1 for eps, following that mean solves the ODE for the polynomial.

    :param known: the levels and values that the polynomial goes through.
    """
    h = path.lam[i + 1] - path.lam[i]
    density = GAUSS_WEIGHTS * np.exp(exponent * h * GAUSS_NODES)
    places = np.array([(path.lam[level] - path.lam[i]) / h for level, _ in known])
    moments = density @ np.vander(GAUSS_NODES, len(known), increasing=True) / density.sum()
    weights = np.linalg.solve(np.vander(places, increasing=True).T, moments).tolist()
    return sum(weight * value for weight, (_, value) in zip(weights, known))


SAMPLERS: dict[str, Callable[[Path, Tensor], Moves]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "sde_dpmpp_2m": sde_dpmpp_2m,
    "unipc": unipc,
    "deis": deis,
    "ipndm": ipndm,
}
WITH_ETA = ("ddim", "sde_dpmpp_2m")  # that can be more or less random
SPACINGS = ("uniform", "quadratic", "logsnr", "karras")


def sample_progressive(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    noise: Tensor,
    *,
    sampler: str,
    steps: int,
    spacing: str = "uniform",
    eta: float = 0.0,
    clip_denoised: bool = True,
    model_kwargs: dict | None = None,
    randn_like: Callable[[Tensor], Tensor] = th.randn_like,
) -> Iterator[dict[str, Tensor]]:
    """Make images of noise in `steps` steps, yielding what is there after each.

    :param model: as in `gaussian_diffusion`; it is told float timesteps, between the whole ones as well.
    :param noise: standard normal, [N, C, H, W]; its dtype and device are those of the work.
    :param sampler: a name in `SAMPLERS`.
    :param steps: from 1 to the number of timesteps of `diffusion`.
    :param spacing: a name in `SPACINGS`; see `space_levels`.
    :param eta: how random the samplers `WITH_ETA` are: 0 not at all; with 1, "ddim" is ancestral sampling with
        FIXED_SMALL, and "sde_dpmpp_2m" solves the diffusion SDE.
    :param clip_denoised: whether every predicted image is clipped to [-1, 1].
    :param model_kwargs: further arguments of the model, such as the labels `y`.
    :param randn_like: draws the noise that a sampler adds, given a tensor of the shape wanted.
    :return: `steps` results: `sample`, x after the step, the last one being the images; and `pred_xstart`, the
        image that the model saw in x before it.
    :raises ValueError: the sampler or spacing is unknown, or steps or eta out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta}: use a value from 0 (deterministic) to 1 (ancestral sampling)")
    if eta and sampler not in WITH_ETA:
        raise ValueError(f"eta {eta}: is for {' or '.join(WITH_ETA)}, not for {sampler}")
    path = Path(
        model,
        diffusion,
        space_levels(diffusion, steps, spacing),
        clip_denoised=clip_denoised,
        model_kwargs=model_kwargs,
        eta=eta,
        randn_like=randn_like,
    )
    return _results(path, SAMPLERS[sampler](path, noise), noise)


def evaluations(sampler: str, steps: int) -> int:
    """How often the model is called for one batch (NFE)."""
    return 2 * steps - 1 if sampler == "heun" else steps


def space_levels(diffusion: GaussianDiffusion, steps: int, spacing: str) -> np.ndarray:
    """The timesteps of a path, float64 [steps], falling from the first one below to 0.

    ``"uniform"``: even, in whole timesteps, those of `space_timesteps`. The others also stop in between:
    ``"quadratic"``: even in the square root of the timestep (Song et al. 2020, appendix D.2). These two begin at
    T - 1. ``"logsnr"``: even in lambda (Lu et al. 2022). ``"karras"``: even in (sigma / alpha)^(1/7) (Karras et al.
    2022, eq. 5). These two leave out what lies below `NOISIEST_LAMBDA`.

    :raises ValueError: the spacing is unknown; there are fewer timesteps than `steps`, or no step.
    """
    last = diffusion.num_timesteps - 1
    if not 1 <= steps <= last + 1:
        raise ValueError(f"steps {steps}: use 1 to {last + 1}, the number of timesteps")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    if spacing == "uniform":
        levels = space_timesteps(last + 1, [steps]) if steps > 1 else [last]
        return np.array(sorted(levels, reverse=True), dtype=np.float64)
    if spacing == "quadratic":
        return last * np.linspace(1, 0, steps) ** 2

    known = log_signal_to_noise(diffusion)
    lowest, highest = max(known[last], NOISIEST_LAMBDA), known[0]
    if spacing == "logsnr":
        lam = np.linspace(lowest, highest, steps)
    else:
        lam = -7 * np.log(np.linspace(math.exp(-lowest / 7), math.exp(-highest / 7), steps))
    timesteps = np.interp(-lam, -known, np.arange(last + 1))
    if lowest == known[last]:
        timesteps[0] = last  # up to rounding, it is
    if steps > 1:
        timesteps[-1] = 0
    return timesteps


def _results(path: Path, moves: Moves, x: Tensor) -> Iterator[dict[str, Tensor]]:
    for _ in range(path.steps - 1):
        # Inside the loop, because a generator must not keep gradients off while its caller has control.
        with th.no_grad():
            x, x0 = next(moves)
        yield {"sample": x, "pred_xstart": x0}
    with th.no_grad():
        x0 = path.denoise(x, path.steps - 1)
    yield {"sample": x0, "pred_xstart": x0}
