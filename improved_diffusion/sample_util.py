"""Drawing images from a trained model. Each image has its own random stream, whatever batch it is drawn in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch as th

from improved_diffusion import dist_util, seeding
from improved_diffusion.data.decode import height_width
from improved_diffusion.editing import Edit
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.progress import Progress
from improved_diffusion.respace import log_signal_to_noise
from improved_diffusion.samplers import NOISIEST_LAMBDA, is_random, path_levels, sample_progressive
from improved_diffusion.seeding import Purpose

# The samplers whose images were measured to be best with quadratic spacing (docs/sampling.md).
QUADRATIC = ("ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m", "deis", "ipndm")
ETA_OF = {"sde_dpmpp_2m": 1.0}  # the default eta; 0 for the other samplers


def suitable_spacing(sampler: str, eta: float, diffusion: GaussianDiffusion | None = None) -> str:
    """The default spacing of a sampler, one of `samplers.SPACINGS`.

    :param diffusion: the one that samples. If it begins with far more noise than images need, as on the cosine
        schedule, the first step of "quadratic" would leap over most of what matters, so there is another one.
    """
    leaps = diffusion is not None and log_signal_to_noise(diffusion)[-1] < NOISIEST_LAMBDA
    if sampler in QUADRATIC and not leaps:
        return "quadratic"
    return "karras" if sampler == "sde_dpmpp_2m" and eta else "logsnr"


@dataclass(frozen=True)
class Plan:
    """How to get from noise to an image.

    :ivar sampler: one of `samplers.SAMPLERS`.
    :ivar steps: the number of steps. None, for ddpm and ddim only: a step for every timestep of the diffusion, as in
        improved-diffusion.
    :ivar spacing: one of `samplers.SPACINGS`; empty: that of `suitable_spacing`.
    :ivar eta: with ddim and sde_dpmpp_2m, how much noise is replaced in each step, from 0 to 1; None: that of `ETA_OF`.
    :ivar clip_denoised: whether the predicted image is clipped to [-1, 1] in every step.
    """

    sampler: str
    steps: int | None = 20
    spacing: str = ""
    eta: float | None = None
    clip_denoised: bool = True

    def __post_init__(self):
        if self.eta is None:
            object.__setattr__(self, "eta", ETA_OF.get(self.sampler, 0.0))
        object.__setattr__(self, "spacing", self.spacing or suitable_spacing(self.sampler, self.eta))

    def count_steps(self, diffusion: GaussianDiffusion, edit: Edit | None = None) -> int:
        """The number of steps from noise, or from the images of `edit`, to the result."""
        steps, spacing = self.path(diffusion)
        return steps if edit is None else edit.steps(len(path_levels(diffusion, steps, spacing, edit)))

    def path(self, diffusion: GaussianDiffusion) -> tuple[int, str]:
        """Number of steps and spacing, as arguments of `sample_progressive`."""
        return (self.steps, self.spacing) if self.steps else (diffusion.num_timesteps, "uniform")

    @property
    def is_random(self) -> bool:
        """Whether the steps add noise."""
        return is_random(self.sampler, self.eta)


DEFAULT_PLAN = Plan("sde_dpmpp_2m", 20)  # measured to be best at 20 steps (docs/sampling.md)
DETERMINISTIC_PLAN = Plan("unipc", 20)  # where the image must be a function of the starting noise


@dataclass(frozen=True)
class Subject:
    """Which images to draw. Images are numbered from 0.

    :ivar image_size: side S in pixels, or (height, width).
    :ivar seed: image i has the random stream of (`seed`, i), which also gives the noise that it starts from.
    :ivar labels: the class of each image, for a class-conditional model.
    :ivar low_res: the images to enlarge, [N, C, s, s] in [-1, 1], for a super-resolution model.
    :ivar latents: [N, C, S, S], what the images start from instead of the noise of `seed`.
    :ivar edit: how to edit M images [M, C, S, S]. Image i is made from number i mod M of them.
    :ivar channels: C, 1 for grey images and 3 for colours.
    """

    image_size: int | tuple[int, int]
    seed: int = 0
    labels: Sequence[int] | None = None
    low_res: th.Tensor | None = None
    latents: th.Tensor | None = None
    edit: Edit | None = None
    channels: int = 3

    def latent(self, numbers: range, randn_like: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
        """The noise that the n images `numbers` start from, [n, C, S, S]."""
        if self.latents is not None:
            return self.latents[numbers.start : numbers.stop]
        return randn_like(th.empty(len(numbers), self.channels, *height_width(self.image_size)))

    def model_kwargs(self, numbers: range) -> dict[str, th.Tensor]:
        """The model's arguments for the n images `numbers`: labels `y` [n] and `low_res` [n, C, s, s], where given."""
        kwargs = {}
        if self.labels is not None:
            kwargs["y"] = th.tensor([self.labels[i] for i in numbers])
        if self.low_res is not None:
            kwargs["low_res"] = self.low_res[numbers.start : numbers.stop]
        return kwargs

    def edit_of(self, numbers: range) -> Edit | None:
        """`edit` with the originals of the n images `numbers`, [n, C, S, S]; None without an edit."""
        if self.edit is None:
            return None
        images = self.edit.images
        return replace(self.edit, images=images[[number % len(images) for number in numbers]])


def draw(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    plan: Plan,
    subject: Subject,
    numbers: range,
) -> Iterator[th.Tensor]:
    """Draw the n images `numbers` of `subject`.

    :yield: tensors [n, C, S, S]: the starting noise, or the images that are edited, then the state after each step. The
        last one holds the results.
    """
    randn_like = per_image_noise(subject.seed, numbers)
    x = subject.latent(numbers, randn_like)
    edit = subject.edit_of(numbers)
    yield x if edit is None else edit.images
    options = {
        "noise": x,
        "clip_denoised": plan.clip_denoised,
        "model_kwargs": subject.model_kwargs(numbers),
        "randn_like": randn_like,
    }
    if plan.steps is not None or edit is not None:
        steps, spacing = plan.path(diffusion)
        states = sample_progressive(
            model,
            diffusion,
            sampler=plan.sampler,
            steps=steps,
            spacing=spacing,
            eta=plan.eta,
            edit=edit,
            **options,
        )
    elif plan.sampler == "ddim":  # at all timesteps
        states = diffusion.ddim_sample_loop_progressive(model, tuple(x.shape), eta=plan.eta, **options)
    else:
        assert plan.sampler == "ddpm"
        states = diffusion.p_sample_loop_progressive(model, tuple(x.shape), **options)
    for state in states:
        yield state["sample"]


def sample_images(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    plan: Plan,
    subject: Subject,
    *,
    num_samples: int,
    batch_size: int,
    frames: int = 1,
    progress: str = "",
) -> Iterator[np.ndarray]:
    """Draw `num_samples` images, batch by batch.

    Image i depends on i, `plan`, `subject` and the model only. `batch_size` changes at most its rounding.
    With several processes, each draws its share, `batch_size` images at a time, and rank 0 receives all of them.

    :param frames: the number of states to return of each image, evenly spread from noise to image; 1: only the image.
    :param progress: the label of a progress display; empty: no display.
    :yield: uint8 [n, F, S, S, C]. n is `batch_size` times the number of processes, or less in the last batch. F is
        `frames`, or the number of states if that is smaller. Ranks other than 0 yield only their share.
    """
    steps = plan.count_steps(diffusion, subject.edit)
    # the steps after which a state is returned
    kept = set(np.linspace(steps, 0, min(frames, steps + 1)).round().astype(int).tolist())
    batches = range(0, num_samples, batch_size * dist_util.get_world_size())
    with Progress(num_samples, steps, progress, show=progress != "" and dist_util.get_rank() == 0) as shown:
        for start in batches:
            batch = range(start, min(start + batches.step, num_samples))
            mine = dist_util.share(batch)
            # A process without a share in the last batch draws one image and drops it.
            numbers = mine or range(start, start + 1)
            states = []
            for step, x in enumerate(draw(model, diffusion, plan, subject, numbers)):
                if step in kept:
                    states.append(to_uint8(x))
                if step:
                    shown.step(len(batch))
            shown.finish(len(batch))
            yield dist_util.gather_arrays(np.stack(states, axis=1)[: len(mine)])


def interpolate(first: th.Tensor, last: th.Tensor, count: int) -> th.Tensor:
    """`count` latents [count, ...] from `first` to `last`, both included, along the great circle through them.

    Noise with many dimensions lies near a sphere around zero. The points of a straight line between two latents are
    inside the sphere, and become grey images. (Shoemake 1985, "Animating rotation with quaternion curves", sec. 3.3.)
    """
    a, b = first.double(), last.double()
    angle = th.acos((a * b).sum() / (a.norm() * b.norm()))
    t = th.linspace(0, 1, count, dtype=th.float64).view(-1, *[1] * first.dim())
    return ((th.sin((1 - t) * angle) * a + th.sin(t * angle) * b) / th.sin(angle)).to(first)


def guide(
    model: Callable[..., th.Tensor],
    scale: float,
    null_label: int,
    within: Callable[[th.Tensor], th.Tensor] | None = None,
) -> Callable[..., th.Tensor]:
    """`model` with classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is `scale` - 1).

    The prediction is f + `scale` (c - f), where c is the model's prediction for the class, and f that for "no class".
    A learned variance is that for the class.

    :param model: a class-conditional model that was trained with class dropout.
    :param null_label: the label that stands for "no class".
    :param within: a function from the model's timesteps [N] to bool [N]: where to guide (see `guidance_interval`).
        Elsewhere `model` is called for the class only, which halves the cost. None: guide everywhere.
    """

    def guided(x: th.Tensor, timesteps: th.Tensor, y: th.Tensor) -> th.Tensor:
        inside = None if within is None else within(timesteps)
        if inside is not None and not inside.any():
            return model(x, timesteps, y=y)
        both = th.cat([y, th.full_like(y, null_label)])
        given, free = model(th.cat([x, x]), th.cat([timesteps, timesteps]), y=both).float().chunk(2)
        return _extrapolate(free, given, scale, x.shape[1], inside)

    return guided


def autoguide(
    model: Callable[..., th.Tensor],
    worse: Callable[..., th.Tensor],
    scale: float,
    within: Callable[[th.Tensor], th.Tensor] | None = None,
) -> Callable[..., th.Tensor]:
    """`model` guided by a `worse` one, such as an earlier checkpoint of its run (Karras et al. 2024, arXiv 2406.02507).

    The prediction is w + `scale` (p - w), where p is that of `model`, and w that of `worse`. A learned variance is that
    of `model`. To guide by the class as well, pass the result to `guide`: then autoguidance improves the prediction
    for the class and that for "no class".

    :param worse: a model with the same prediction type, noise schedule and arguments as `model`.
    :param within: as in `guide`; elsewhere `worse` is not called.
    """

    def guided(x: th.Tensor, timesteps: th.Tensor, **kwargs: th.Tensor) -> th.Tensor:
        inside = None if within is None else within(timesteps)
        better = model(x, timesteps, **kwargs)
        if inside is not None and not inside.any():
            return better
        return _extrapolate(worse(x, timesteps, **kwargs).float(), better.float(), scale, x.shape[1], inside)

    return guided


def guidance_interval(
    diffusion: GaussianDiffusion, low: float, high: float
) -> Callable[[th.Tensor], th.Tensor]:
    """The argument `within` of `guide`: guide where the noise sigma lies in an interval (Kynkäänniemi et al. 2024,
    arXiv 2404.07724).

    :param diffusion: the diffusion that samples, with the timesteps that it gives to the model.
    :param low, high: the interval of sigma = sqrt((1 - alpha_bar) / alpha_bar), the noise relative to the image.
    :return: a function from the model's timesteps [N] to bool [N].
    :raises ValueError: `low` is negative or not below `high`, or no timestep has such noise.
    """
    if not 0 <= low < high:
        raise ValueError(
            f"interval from {low} to {high}: expected two numbers from 0 on, the first one smaller"
        )
    model_timesteps = diffusion.model_timesteps(th.arange(diffusion.num_timesteps)).double().numpy()
    # The samplers interpolate lambda = -log sigma linearly between timesteps.
    log_sigma = -log_signal_to_noise(diffusion)
    least, most = np.exp(log_sigma[[0, -1]])
    if high < least or low > most:
        raise ValueError(f"{low:g},{high:g}: this model's noise is from {least:.3g} to {most:.3g}")

    def within(timesteps: th.Tensor) -> th.Tensor:
        sigma = np.exp(np.interp(timesteps.double().cpu().numpy(), model_timesteps, log_sigma))
        return th.from_numpy((low <= sigma) & (sigma <= high)).to(timesteps.device)

    return within


def _extrapolate(
    start: th.Tensor, end: th.Tensor, scale: float, channels: int, inside: th.Tensor | None
) -> th.Tensor:
    """start + scale (end - start) in the first `channels` channels, the prediction; `end` in the rest, the variance.

    :param inside: bool [N]: for which images. For the others, the result is `end`. None: for all.
    """
    prediction = th.lerp(start[:, :channels], end[:, :channels], scale)
    if inside is not None:
        prediction = th.where(inside.view(-1, *[1] * (end.dim() - 1)), prediction, end[:, :channels])
    return th.cat([prediction, end[:, channels:]], dim=1)


def per_image_noise(seed: int, numbers: Sequence[int]) -> Callable[[th.Tensor], th.Tensor]:
    """A function like `torch.randn_like` for a batch [N, ...], whose row k draws from the random stream of image
    `numbers[k]` of `seed`."""
    streams = [seeding.generator(seed, Purpose.SAMPLE, number) for number in numbers]

    def randn_like(x: th.Tensor) -> th.Tensor:
        return th.stack([seeding.normal(stream, tuple(x.shape[1:])) for stream in streams]).to(x)

    return randn_like


def to_uint8(x: th.Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C], rounded and clipped."""
    scaled = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(pixels: np.ndarray) -> th.Tensor:
    """Images uint8 [N, H, W, C] as float32 [N, C, H, W] in [-1, 1], the range that models are trained in."""
    return th.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
