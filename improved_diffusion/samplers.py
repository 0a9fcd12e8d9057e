"""Samplers that need few steps: solvers of the ODE from noise to image, and the levels of noise they step through.

The notation is that of Lu et al. 2022. At every level, x is a mixture of an image x_0 and standard normal noise eps:

    x = alpha x_0 + sigma eps,  alpha^2 + sigma^2 = 1,  lambda = log(alpha / sigma),  h = lambda' - lambda.

A prime marks the next level, which has less noise. alpha^2 is the alpha_bar of `gaussian_diffusion`. A model that
predicts x_0 or eps, and so the other one as well, defines the probability-flow ODE of Song et al. 2021:

    d(x / alpha) = eps d(sigma / alpha),    d(x / sigma) = x_0 d(alpha / sigma).

If eps (or x_0) were constant, a step of any length would be exact. The solvers differ in how they extrapolate it.
Each solver is a generator function of a `Path` and the noise at its first level. For every further level, it yields
x there and the x_0 that was predicted at the level before. The last level is timestep 0; there, every solver ends
with the predicted x_0.

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

from improved_diffusion.editing import Edit
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.respace import InterpolatedDiffusion, log_signal_to_noise, space_timesteps

Moves = Iterator[tuple[Tensor, Tensor]]  # x at the next level, and the x_0 predicted at the level before it
Known = list[tuple[int, Tensor]]  # levels, and the x_0 or eps predicted there, the newest first

# Below this lambda nothing is left of the image (Lu et al. 2022), and steps there are wasted. In the cosine schedule,
# the last few of a thousand timesteps cover a third of the range of lambda there. In the very last one, 1 / alpha is
# 20,000, which multiplies the error of a model of eps.
NOISIEST_LAMBDA = -5.1
# The first step of "karras" leads to this sigma / alpha or below. Above it, nothing but the mean colour of an image
# shows, and of 20 steps, five would be spent there (docs/sampling.md).
KARRAS_SIGMA = 40.0

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
GAUSS_NODES, GAUSS_WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2  # quadrature on [0, 1]


class Path:
    """The levels from noise to image, and the model: all that a solver needs.

    :param model, diffusion, clip_denoised, model_kwargs, eta, randn_like, edit: as in `sample_progressive`.
    :param timesteps: those of the levels, float64 [steps], falling; they need not be whole numbers.

    `alpha`, `sigma` and `lam` (lambda) hold one number per level. `diffusion` has the levels as its timesteps.
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
        edit: Edit | None,
    ):
        self.steps = len(timesteps)
        self.eta = eta
        self.randn_like = randn_like
        self.edit = edit
        self.diffusion = InterpolatedDiffusion(diffusion, timesteps[::-1])
        self.model = model
        self.model_kwargs = model_kwargs
        self.clip_denoised = clip_denoised
        # The arguments of p_sample and ddim_sample that are the same in all steps.
        self.options = {
            "clip_denoised": clip_denoised,
            "model_kwargs": model_kwargs,
            "randn_like": randn_like,
        }
        self.lam: list[float] = log_signal_to_noise(self.diffusion)[::-1].tolist()
        self.alpha: list[float] = self.diffusion.sqrt_alphas_cumprod[::-1].tolist()
        self.sigma: list[float] = self.diffusion.sqrt_one_minus_alphas_cumprod[::-1].tolist()

    def timestep(self, x: Tensor, i: int) -> Tensor:
        """Level i as a timestep of `diffusion`, int64 [N], for the N images in x."""
        return th.full((len(x),), self.steps - 1 - i, device=x.device)

    def denoise(self, x: Tensor, i: int) -> Tensor:
        """The x_0 that the model predicts from x at level i, of x's shape."""
        t = self.timestep(x, i)
        prediction, _ = self.diffusion.predict(self.model, x, t, self.model_kwargs)
        return self.diffusion.predicted_x_start(prediction, x, t, self.clip_denoised)

    def eps(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        """The noise in x at level i, given that its image is `x0`."""
        return self.diffusion.eps_of(x0, x, self.timestep(x, i))

    def departures(self) -> Iterator[tuple[int, bool]]:
        """For each step of a sampler that adds noise: the level it starts from, and whether x then returns there."""
        if self.edit is None:
            return ((i, False) for i in range(self.steps - 1))
        return self.edit.departures(self.steps)

    def arrive(self, x: Tensor, i: int, back: bool) -> Tensor:
        """x after the step to level i, with the kept part taken from the images (Lugmayr et al. 2022, algorithm 1).

        :param back: whether to add noise, so that x is at level i - 1 again.
        """
        if self.edit is None or self.edit.mask is None:
            return x
        x = self.edit.merge(x, self.edit.noised(self.alpha[i], self.sigma[i], self.randn_like(x)))
        if not back:
            return x
        ratio = self.alpha[i - 1] / self.alpha[i]
        variance = self.sigma[i - 1] ** 2 - (ratio * self.sigma[i]) ** 2
        return ratio * x + math.sqrt(variance) * self.randn_like(x)

    def order(self, highest: int, i: int) -> int:
        """The order of a multistep solver's step from level i: lower in the first steps, which know few levels, and in
        the last ones (`lower_order_final` in the code of Lu et al. 2022)."""
        return min(highest, i + 1, self.steps - i)


def ddpm(path: Path, x: Tensor) -> Moves:
    """Ancestral sampling: draw x' from p(x' | x) (Ho et al. 2020, algorithm 2)."""
    for i, back in path.departures():
        result = path.diffusion.p_sample(path.model, x, path.timestep(x, i), **path.options)
        x = path.arrive(result["sample"], i + 1, back)
        yield x, result["pred_xstart"]


def ddim(path: Path, x: Tensor) -> Moves:
    """DDIM (Song et al. 2020, eq. 12 and 16): keep x_0, and all of eps that fresh noise does not replace."""
    for i, back in path.departures():
        t = path.timestep(x, i)
        result = path.diffusion.ddim_sample(path.model, x, t, eta=path.eta, **path.options)
        x = path.arrive(result["sample"], i + 1, back)
        yield x, result["pred_xstart"]


def heun(path: Path, x: Tensor) -> Moves:
    """Heun's method for x / alpha as a function of sigma / alpha, with slope eps (Karras et al. 2022, algorithm 1).

    It averages the slopes at both ends of a step, which takes two calls of the model.
    """
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        eps = path.eps(x, x0, i)
        euler = path.alpha[i + 1] * x0 + path.sigma[i + 1] * eps
        next_x0 = path.denoise(euler, i + 1)
        if path.lam[i] < NOISIEST_LAMBDA:
            # sigma / alpha can start at 20,000, which would multiply rounding errors of the slopes. So average x_0.
            x = _follow_x0(path, i, x, (x0 + next_x0) / 2)
        else:
            x = _follow_eps(path, i, x, (eps + path.eps(euler, next_x0, i + 1)) / 2)
        yield x, x0


def dpmpp_2m(path: Path, x: Tensor) -> Moves:
    """DPM-Solver++(2M): extrapolate x_0 on the line through its last two values (Lu et al. 2022, algorithm 2)."""
    return _dpmpp(path, x, order=2)


def dpmpp_3m(path: Path, x: Tensor) -> Moves:
    """DPM-Solver++(3M): extrapolate x_0 on the parabola through its last three values (Lu et al. 2022, section 4).

    It has order 3. The variant in diffusers halves the parabola's curvature, and has order 2.
    """
    return _dpmpp(path, x, order=3)


def sde_dpmpp_2m(path: Path, x: Tensor) -> Moves:
    """SDE-DPM-Solver++(2M): DPM-Solver++(2M) with fresh noise in every step (Lu et al. 2022, eq. 18).

    A step of length h in lambda keeps the share e^(-2 eta h) of the noise's variance and replaces the rest. With eta 1
    this solves the diffusion SDE. With eta 0 it is DPM-Solver++(2M), which solves the ODE.
    """
    known: Known = []
    for i, back in path.departures():
        x0 = path.denoise(x, i)
        known = [(i, x0), *known[:1]]
        extrapolated = _extrapolate_x0(path, i, known[: path.order(2, i)])
        h = path.lam[i + 1] - path.lam[i]
        kept = path.sigma[i + 1] / path.sigma[i] * math.exp(-path.eta * h)
        x = kept * x + (path.alpha[i + 1] - kept * path.alpha[i]) * extrapolated
        if path.eta:
            fresh = path.sigma[i + 1] * math.sqrt(-math.expm1(-2 * path.eta * h))
            x = x + fresh * path.randn_like(x)
        x = path.arrive(x, i + 1, back)
        if back:
            known = []  # predictions from before the new noise; extrapolating from these would diverge
        yield x, x0


def _dpmpp(path: Path, x: Tensor, order: int) -> Moves:
    known: Known = []
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        known = [(i, x0), *known[: order - 1]]
        x = _follow_x0(path, i, x, _extrapolate_x0(path, i, known[: path.order(order, i)]))
        yield x, x0


def unipc(path: Path, x: Tensor) -> Moves:
    """UniPC of order 3, for x_0 and with B(h) = e^h - 1 (Zhao et al. 2023, sections 3.1 to 3.3).

    The x_0 predicted at a new level is used twice: to correct the step to that level, and for the next step.
    """
    known: Known = []
    start, order = x, 0
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        if i > 0:
            x = _follow_x0(path, i - 1, start, _extrapolate_x0(path, i - 1, [(i, x0), *known[:order]]))
        start, order = x, path.order(3, i)
        known = [(i, x0), *known[:2]]
        x = _follow_x0(path, i, start, _extrapolate_x0(path, i, known[:order]))
        yield x, x0


def deis(path: Path, x: Tensor) -> Moves:
    """DEIS of order 3: extrapolate eps on a parabola in lambda (Zhang & Chen 2022, eq. 14 and 15).

    The paper's polynomials are in time (tAB) or in sigma / alpha (rhoAB). A polynomial in lambda is diffusers' variant.
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
    """PNDM without its Runge-Kutta start: DDIM steps, eps extrapolated by Adams-Bashforth (Liu et al. 2022, section 3).

    The weights are those of steps of equal length. Other spacings reduce the order to 2.
    """
    past: list[Tensor] = []
    for i in range(path.steps - 1):
        x0 = path.denoise(x, i)
        past = [path.eps(x, x0, i), *past[:3]]
        weights = ADAMS_BASHFORTH[path.order(4, i) - 1]
        x = _follow_eps(path, i, x, sum(weight * eps for weight, eps in zip(weights, past)))
        yield x, x0


def _follow_eps(path: Path, i: int, x: Tensor, eps: Tensor) -> Tensor:
    """x at level i + 1, if eps is constant from level i on."""
    ratio = path.alpha[i + 1] / path.alpha[i]
    return ratio * x + (path.sigma[i + 1] - ratio * path.sigma[i]) * eps


def _follow_x0(path: Path, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """x at level i + 1, if x_0 is constant from level i on."""
    ratio = path.sigma[i + 1] / path.sigma[i]
    return ratio * x + (path.alpha[i + 1] - ratio * path.alpha[i]) * x0


def _extrapolate_x0(path: Path, i: int, known: Known) -> Tensor:
    """The constant x_0 that stands for the changing one in the step from level i to level i + 1.

    For a line through two values, Lu et al. and Zhao et al. take its value halfway; the order is the same.
    """
    return _mean_ahead(path, i, known, exponent=1 if len(known) > 2 else 0)


def _mean_ahead(path: Path, i: int, known: Known, exponent: int) -> Tensor:
    """The mean of a polynomial in lambda between the levels i and i + 1, weighted by e^(exponent lambda).

    With exponent 1 for x_0, or -1 for eps, a step with this mean solves the ODE of that polynomial exactly.

    :param known: levels, and the values there, through which the polynomial goes.
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
WITH_ETA = ("ddim", "sde_dpmpp_2m")  # samplers whose share of fresh noise can be chosen
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
    edit: Edit | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Turn noise into images in `steps` steps, and yield the state after each step.

    :param model: as in `gaussian_diffusion`. It is given float timesteps, which need not be whole numbers.
    :param noise: standard normal, [N, C, H, W]; all computations have its dtype and device.
    :param sampler: a name in `SAMPLERS`.
    :param steps: from 1 to the number of timesteps of `diffusion`.
    :param spacing: a name in `SPACINGS`; see `space_levels`.
    :param eta: how much noise the samplers in `WITH_ETA` replace. 0: none. With 1, "ddim" is ancestral sampling with
        FIXED_SMALL, and "sde_dpmpp_2m" solves the diffusion SDE.
    :param clip_denoised: whether every predicted image is clipped to [-1, 1].
    :param model_kwargs: further arguments of the model, such as the labels `y`.
    :param randn_like: draws the noise that a sampler adds; given a tensor, it returns noise of that shape.
    :param edit: images to begin from instead of `noise`. A mask needs a sampler that adds noise (`is_random`).
    :return: `steps` results; with `edit`, `Edit.steps` of its levels. `sample` is x after the step; in the last result,
        the images. `pred_xstart` is the image that the model predicts in this step. Both are [N, C, H, W].
    :raises ValueError: the sampler or spacing is unknown, steps or eta are out of range, the model predicts
        x_{t-1}, or the sampler takes no mask.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta}: use a value from 0 (deterministic) to 1 (ancestral sampling)")
    if eta and sampler not in WITH_ETA:
        raise ValueError(f"eta {eta}: only {' and '.join(WITH_ETA)} take it, not {sampler}")
    if edit is not None and edit.mask is not None and not is_random(sampler, eta):
        raise ValueError(f"mask: needs a sampler that adds noise, not {sampler} with eta {eta}")
    path = Path(
        model,
        diffusion,
        path_levels(diffusion, steps, spacing, edit),
        clip_denoised=clip_denoised,
        model_kwargs=model_kwargs,
        eta=eta,
        randn_like=randn_like,
        edit=edit,
    )
    x = noise if edit is None else edit.begin(path.alpha[0], path.sigma[0], noise)
    moves = SAMPLERS[sampler](path, x)
    return _results(path, moves, x, path.steps if edit is None else edit.steps(path.steps))


def is_random(sampler: str, eta: float) -> bool:
    """Whether the steps of a sampler add noise."""
    return sampler == "ddpm" or eta > 0


def evaluations(sampler: str, steps: int) -> int:
    """How often the model is called for one batch (NFE)."""
    return 2 * steps - 1 if sampler == "heun" else steps


def path_levels(diffusion: GaussianDiffusion, steps: int, spacing: str, edit: Edit | None) -> np.ndarray:
    """The timesteps of a path: those of `space_levels`, of which an edit may keep only a part."""
    levels = space_levels(diffusion, steps, spacing)
    return levels if edit is None else edit.levels(levels, diffusion.num_timesteps)


def space_levels(diffusion: GaussianDiffusion, steps: int, spacing: str) -> np.ndarray:
    """The timesteps of a path, float64 [steps], falling to 0.

    ``"uniform"``: whole timesteps from T - 1 on, evenly spaced (those of `space_timesteps`).
    ``"quadratic"``: from T - 1 on, evenly spaced in the square root of the timestep (Song et al. 2020, appendix D.2).
    ``"logsnr"``: evenly spaced in lambda (Lu et al. 2022). ``"karras"``: evenly spaced in (sigma / alpha)^(1/7)
    (Karras et al. 2022, eq. 5), but the first step leads to `KARRAS_SIGMA` if it would end above it. Both start at
    `NOISIEST_LAMBDA`, or at T - 1 where that has less noise.
    All but "uniform" give timesteps between the whole ones.

    :raises ValueError: the spacing is unknown, or `steps` is below 1 or above the number of timesteps.
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
        lam = _even_roots(lowest, highest, steps)
        after = -math.log(KARRAS_SIGMA)
        if steps > 1 and lam[1] < after < highest:
            lam = np.append(lowest, _even_roots(after, highest, steps - 1))
    timesteps = np.interp(-lam, -known, np.arange(last + 1))
    if lowest == known[last]:
        timesteps[0] = last  # without the rounding of np.interp
    if steps > 1:
        timesteps[-1] = 0
    return timesteps


def _even_roots(first: float, last: float, count: int) -> np.ndarray:
    """`count` values of lambda from `first` to `last`, evenly spaced in (sigma / alpha)^(1/7)."""
    return -7 * np.log(np.linspace(math.exp(-first / 7), math.exp(-last / 7), count))


def _results(path: Path, moves: Moves, x: Tensor, steps: int) -> Iterator[dict[str, Tensor]]:
    for _ in range(steps - 1):
        # Around each step, not around the loop: between steps the caller runs, whose gradients must stay on.
        with th.no_grad():
            x, x0 = next(moves)
        yield {"sample": x, "pred_xstart": x0}
    with th.no_grad():
        x0 = path.denoise(x, path.steps - 1)
        sample = x0 if path.edit is None else path.edit.merge(x0, path.edit.images.to(x0))
    yield {"sample": sample, "pred_xstart": x0}
