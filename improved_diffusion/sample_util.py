"""Drawing images from a trained model: each image has its own random stream, so batches do not matter."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from improved_diffusion import dist_util, seeding
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.progress import Progress
from improved_diffusion.respace import log_signal_to_noise
from improved_diffusion.samplers import sample_progressive
from improved_diffusion.seeding import Purpose

# For each sampler the spacing that was measured to be best (docs/sampling.md); with noise, that of RANDOM.
SPACING = "logsnr"
SPACING_OF = {"ipndm": "quadratic"}
SPACING_OF_RANDOM = "quadratic"
ETA_OF = {"sde_dpmpp_2m": 1.0}  # of the others: 0


def suitable_spacing(sampler: str, eta: float = 0.0) -> str:
    """The spacing that suits a sampler best, one of `samplers.SPACINGS`."""
    if eta or sampler == "ddpm":
        return SPACING_OF_RANDOM
    return SPACING_OF.get(sampler, SPACING)


@dataclass(frozen=True)
class Plan:
    """How to get from noise to an image.

    :ivar sampler: one of `samplers.SAMPLERS`.
    :ivar steps: how many; None, with ddpm and ddim: one at every timestep of the diffusion, as improved-diffusion
        does it.
    :ivar spacing: one of `samplers.SPACINGS`: how the steps are spread; when not given, what suits the sampler.
    :ivar eta: with ddim and sde_dpmpp_2m, how random a step is, from 0, not at all, to 1; when not given,
        that of `ETA_OF`.
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

    def count_steps(self, diffusion: GaussianDiffusion) -> int:
        """The steps that an image takes."""
        return self.steps or diffusion.num_timesteps

    @property
    def is_random(self) -> bool:
        """Whether noise is added on the way."""
        return self.sampler == "ddpm" or self.eta > 0


# What was measured to be best at 20 steps (docs/sampling.md), and what is best where the noise alone is to decide.
DEFAULT_PLAN = Plan("ddim", 20, eta=1.0)
DETERMINISTIC_PLAN = Plan("unipc", 20)


@dataclass(frozen=True)
class Subject:
    """What the images are to be, each by its number.

    :ivar image_size: side in pixels.
    :ivar seed: image i starts from the noise of (`seed`, i).
    :ivar labels: the class of each image, for a class-conditional model.
    :ivar low_res: the images to enlarge, [N, 3, s, s] in [-1, 1], for a super-resolution model.
    :ivar latents: noise [N, 3, image_size, image_size] to start from instead.
    """

    image_size: int
    seed: int = 0
    labels: Sequence[int] | None = None
    low_res: th.Tensor | None = None
    latents: th.Tensor | None = None

    def latent(self, numbers: range, randn_like: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
        """What the images `numbers` start from."""
        if self.latents is not None:
            return self.latents[numbers.start : numbers.stop]
        return randn_like(th.empty(len(numbers), 3, self.image_size, self.image_size))

    def model_kwargs(self, numbers: range) -> dict[str, th.Tensor]:
        """What a model is told of the images `numbers`."""
        told = {}
        if self.labels is not None:
            told["y"] = th.tensor([self.labels[i] for i in numbers])
        if self.low_res is not None:
            told["low_res"] = self.low_res[numbers.start : numbers.stop]
        return told


def draw(
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    plan: Plan,
    subject: Subject,
    numbers: range,
) -> Iterator[th.Tensor]:
    """Draw the images `numbers` of `subject`.

    :yield: the noise they start from, and what it has become after each step, [n, 3, S, S]; the last is the images.
    """
    randn_like = per_image_noise(subject.seed, numbers)
    x = subject.latent(numbers, randn_like)
    yield x
    options = {
        "noise": x,
        "clip_denoised": plan.clip_denoised,
        "model_kwargs": subject.model_kwargs(numbers),
        "randn_like": randn_like,
    }
    if plan.steps is not None:
        states = sample_progressive(
            model,
            diffusion,
            sampler=plan.sampler,
            steps=plan.steps,
            spacing=plan.spacing,
            eta=plan.eta,
            **options,
        )
    elif plan.sampler == "ddim":
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
    """Draw images, batch by batch.

    Image i is a function of `plan`, its number and `subject`, and the model, not of `batch_size`, up to rounding.
    With several processes each draws its share, `batch_size` images at a time, and rank 0 gets them all.

    :param frames: how many states on the way from noise to image are wanted, if there are so many; 1: the image.
    :param progress: a word for what is being done, to show how far it is; empty: show nothing.
    :yield: uint8 [n, F, S, S, 3], F at most `frames` and n = `batch_size` times the number of processes but for the
        last batch; on other ranks than 0, their share of these.
    """
    steps = plan.count_steps(diffusion)
    kept = set(np.linspace(steps, 0, min(frames, steps + 1)).round().astype(int).tolist())
    batches = range(0, num_samples, batch_size * dist_util.get_world_size())
    with Progress(num_samples, steps, progress, show=progress != "" and dist_util.get_rank() == 0) as shown:
        for start in batches:
            batch = range(start, min(start + batches.step, num_samples))
            mine = dist_util.share(batch)
            # A process without a share draws something, and drops it.
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

    Noise in so many dimensions lies on a sphere around zero. A straight line between two points leaves it, and
    becomes a grey image (Shoemake 1985, "Animating rotation with quaternion curves", sec. 3.3).
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

    Its prediction is moved from that without a class towards, and for `scale` > 1 beyond, that for the class
    given. A learned variance is taken from the latter as it is.

    :param model: a class-conditional model that was trained with class dropout.
    :param null_label: the label that stands for "no class".
    :param within: tells for timesteps, as the model is told them, where to guide (see `guidance_interval`);
        elsewhere `model` is called for the class alone, which costs half. None: everywhere.
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

    Its prediction is moved away from that of the worse model: D + (`scale` - 1) (D - D_worse). To guide by the class
    as well, give the result to `guide`: then both the prediction for the class and that without are improved first,
    and each scale means what it means alone.

    :param worse: told the same as `model`; it must predict the same, on the same schedule. A learned variance is that
        of `model`.
    :param within: as in `guide`; elsewhere `worse` is not called.
    """

    def guided(x: th.Tensor, timesteps: th.Tensor, **told: th.Tensor) -> th.Tensor:
        inside = None if within is None else within(timesteps)
        prediction = model(x, timesteps, **told)
        if inside is not None and not inside.any():
            return prediction
        return _extrapolate(
            worse(x, timesteps, **told).float(), prediction.float(), scale, x.shape[1], inside
        )

    return guided


def guidance_interval(
    diffusion: GaussianDiffusion, low: float, high: float
) -> Callable[[th.Tensor], th.Tensor]:
    """Where `guide` is to guide: where the noise lies in an interval (Kynkaanniemi et al. 2024, arXiv 2404.07724).

    :return: tells for timesteps [N], as the model is told them, whether theirs does: bool [N].
    :param diffusion: that of the model, which is told timesteps as it tells them.
    :param low, high: of sigma = sqrt((1 - alpha_bar) / alpha_bar), noise relative to an undiminished image.
    :raises ValueError: there is no number between them.
    """
    if not 0 <= low < high:
        raise ValueError(f"--guidance_interval {low},{high}: expected two numbers, the first one smaller")
    told = diffusion.model_timesteps(th.arange(diffusion.num_timesteps)).double().numpy()
    # The samplers interpolate lambda = -log sigma linearly between timesteps.
    known = -log_signal_to_noise(diffusion)

    def within(timesteps: th.Tensor) -> th.Tensor:
        sigma = np.exp(np.interp(timesteps.double().cpu().numpy(), told, known))
        return th.from_numpy((low <= sigma) & (sigma <= high)).to(timesteps.device)

    return within


def _extrapolate(
    start: th.Tensor, end: th.Tensor, scale: float, channels: int, inside: th.Tensor | None
) -> th.Tensor:
    """From `start` towards, or beyond, `end` in the first channels, the prediction, and `end` in those of the variance.

    :param inside: bool [N], for which images; for the others it is `end`.
    """
    prediction = th.lerp(start[:, :channels], end[:, :channels], scale)
    if inside is not None:
        prediction = th.where(inside.view(-1, *[1] * (end.dim() - 1)), prediction, end[:, :channels])
    return th.cat([prediction, end[:, channels:]], dim=1)


def per_image_noise(seed: int, numbers: Sequence[int]) -> Callable[[th.Tensor], th.Tensor]:
    """A stand-in for `torch.randn_like` on a batch whose image k gets the random stream of image `numbers[k]`."""
    streams = [seeding.generator(seed, Purpose.SAMPLE, number) for number in numbers]

    def randn_like(x: th.Tensor) -> th.Tensor:
        return th.stack([seeding.normal(stream, tuple(x.shape[1:])) for stream in streams]).to(x)

    return randn_like


def to_uint8(x: th.Tensor) -> np.ndarray:
    """Images [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3], rounded and clipped."""
    scaled = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(pixels: np.ndarray) -> th.Tensor:
    """Images uint8 [N, H, W, 3] as float32 [N, 3, H, W] in [-1, 1]: what models are trained on."""
    return th.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
