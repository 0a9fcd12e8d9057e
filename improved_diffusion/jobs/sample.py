"""The job of image_sample.py: draw images. With the functions that other drawing jobs use too."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch as th

from improved_diffusion.config import ComparingConfig, DrawingFlags, SampleConfig, SamplerFlags, interval
from improved_diffusion.data.class_labels import parse_class_labels
from improved_diffusion.data.decode import height_width
from improved_diffusion.flags import Flags, errors_about
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.jobs.edit import read_edit, save_originals
from improved_diffusion.jobs.runs import Trained, choose_out_dir, open_like, open_model
from improved_diffusion.pictures import save_samples
from improved_diffusion.sample_util import (
    DEFAULT_PLAN,
    DETERMINISTIC_PLAN,
    Plan,
    Subject,
    autoguide,
    guidance_interval,
    guide,
    interpolate,
    per_image_noise,
    sample_images,
    suitable_spacing,
)
from improved_diffusion.samplers import WITH_ETA
from improved_diffusion.script_util import check_images_fit, count_classes, join_processes

MAX_FRAMES = 60  # of an animation
INTERPOLATED = 10  # images of an interpolation, if --num_samples is not given
MAX_ROWS = 10
YOUNG = 8000  # images; the model of the README draws shapes only after some ten thousands


def run_sampling(config: SampleConfig, given: set[str], project: str) -> int:
    """Draw images, and write them into a directory.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``models``, ``runs`` and ``samples``, the default place for images.
    :return: the exit code.
    :raises ValueError: a flag does not fit the model; nothing was drawn.
    """
    join_processes(config)
    drawing = prepare_drawing(open_model(config, given, project), given)
    out_dir = choose_out_dir(drawing.config.log_dir, os.path.join(project, "samples"))
    if drawing.subject.edit is not None:
        save_originals(drawing.subject.edit, out_dir)
    return draw_into(
        out_dir,
        drawing.model,
        drawing.diffusion,
        drawing.plan,
        drawing.subject,
        drawing.config,
        count=drawing.count,
        rows=drawing.rows,
        doing="drawing",
    )


@dataclass(frozen=True)
class Drawing:
    """The inputs of a drawing job.

    :ivar model: a function, with the guidance of the flags.
    :ivar config: all flags.
    :ivar count: the number of images.
    :ivar rows: the row of each image in the picture (see `pictures.image_grid`).
    """

    model: Callable[..., th.Tensor]
    diffusion: GaussianDiffusion
    plan: Plan
    subject: Subject
    config: SampleConfig
    count: int
    rows: np.ndarray | None


def prepare_drawing(opened: Trained, given: set[str]) -> Drawing:
    """The drawing job of the flags. :raises ValueError: a flag does not fit the model.

    :param given: the names of the flags that the user gave.
    """
    model, diffusion, config = opened.model, opened.diffusion, opened.config
    plan = choose_plan(config, given, diffusion)
    if config.interpolate and "num_samples" not in given:
        config = replace(config, num_samples=INTERPOLATED)
    edit = read_edit(config, given, plan) if config.init_image else None
    if edit is not None and "num_samples" not in given:
        config = replace(config, num_samples=len(edit.images))
    labels = choose_labels(config, opened.class_names)
    if labels and edit is None and not config.interpolate and "num_samples" not in given:
        config = replace(config, num_samples=_in_whole_rows(config.num_samples, len(labels)))
    check_images_fit(config, "batch_size", bytes_per_number=4)
    check_images_fit(config, "num_samples", bytes_per_number=1)
    warn_of_youth(opened.images)
    model = guided(model, config, diffusion, opened.class_names)
    describe = describe_interpolation if config.interpolate else describe_images
    subject, rows = describe(config, plan, labels)
    if edit is not None:
        subject = replace(subject, edit=edit)
        if 1 < len(edit.images) < config.num_samples:
            rows = np.arange(config.num_samples) % len(edit.images)  # one for each image
    count = config.num_samples if subject.latents is None else len(subject.latents)
    return Drawing(model, diffusion, plan, subject, config, count, rows)


def _in_whole_rows(count: int, rows: int) -> int:
    """The smallest multiple of `rows` that is at least `count`; `count` itself if it is below `rows`."""
    return count if rows > count else -(-count // rows) * rows


def where_to_guide(text: str, diffusion: GaussianDiffusion) -> Callable[[th.Tensor], th.Tensor] | None:
    """The argument `within` of `guide` for the text of --guidance_interval; None if it is empty.

    :raises ValueError: the diffusion has no such noise; the message names the flag.
    """
    limits = interval(text)
    if limits is None:
        return None
    with errors_about("guidance_interval"):
        return guidance_interval(diffusion, *limits)


def guided(
    model: Callable[..., th.Tensor],
    config: SampleConfig | ComparingConfig,
    diffusion: GaussianDiffusion,
    class_names: list[str],
) -> Callable[..., th.Tensor]:
    """`model` with the guidance of the flags. :raises ValueError: the model or the flags do not allow it."""
    within = where_to_guide(config.guidance_interval, diffusion)
    if config.autoguidance_path:
        worse = open_like(config.autoguidance_path, config, class_names, "autoguidance_path")
        if config.autoguidance_scale != 1:
            model = autoguide(model, worse, config.autoguidance_scale, within)
    if config.guidance_scale != 1:
        if not config.class_dropout:
            lacks = "--class_dropout" if config.class_cond else "classes"
            raise ValueError(
                f"--guidance_scale {config.guidance_scale}: this model was trained without {lacks}; leave the flag out"
            )
        model = guide(model, config.guidance_scale, count_classes(config), within)
    elif within is not None and not (config.autoguidance_path and config.autoguidance_scale != 1):
        raise ValueError(
            f"--guidance_interval {config.guidance_interval}: needs --guidance_scale or --autoguidance_path"
        )
    return model


def describe_images(
    config: SampleConfig, plan: Plan, labels: list[int] | None
) -> tuple[Subject, np.ndarray | None]:
    """Independent images of the classes in turn. Each class has its own row in the grid."""
    labels = None if labels is None else np.resize(labels, config.num_samples)
    return Subject(config.output_size, config.seed, labels, channels=config.colour_channels), labels


def describe_interpolation(
    config: SampleConfig, plan: Plan, labels: list[int] | None
) -> tuple[Subject, np.ndarray | None]:
    """Images from image 0 to image 1 of the seed: a row for each of the first `MAX_ROWS` classes.

    :raises ValueError: the sampler adds noise.
    """
    if plan.is_random:
        raise ValueError(
            f"--interpolate True: needs a sampler that adds no noise, not {plan.sampler}"
            + (f" with --eta {plan.eta}" if plan.eta else "")
        )
    points, size = config.num_samples, config.output_size
    ends = per_image_noise(config.seed, range(2))(th.empty(2, config.colour_channels, *height_width(size)))
    classes = labels[:MAX_ROWS] if labels else [0]
    rows = np.repeat(classes, points)
    latents = interpolate(*ends, points).repeat(len(classes), 1, 1, 1)
    subject = Subject(size, config.seed, rows if labels else None, latents=latents)
    return replace(subject, channels=config.colour_channels), rows


def choose_plan(config: SamplerFlags, given: set[str], diffusion: GaussianDiffusion) -> Plan:
    """The sampler and the steps of the flags.

    Without a sampler in the flags, this is `DEFAULT_PLAN`, or `DETERMINISTIC_PLAN` for an interpolation.

    --use_ddim and --timestep_respacing, the flags of improved-diffusion, mean the same as there if neither a sampler
    nor a number of steps is given: ancestral sampling or DDIM at all timesteps that --timestep_respacing leaves.
    --sampler ddpm alone means ancestral sampling at all timesteps.

    :param given: the names of the flags that the user gave; the others have their defaults.
    :param diffusion: the diffusion of the model, respaced by --timestep_respacing.
    :raises ValueError: two flags contradict each other, or the model has too few timesteps.
    """
    default = DETERMINISTIC_PLAN if getattr(config, "interpolate", False) else DEFAULT_PLAN
    respacing = config.timestep_respacing
    if "sampler" in given:
        sampler = config.sampler
    elif respacing or "use_ddim" in given:
        sampler = "ddim" if config.use_ddim else "ddpm"
    else:
        sampler = default.sampler
    if "sampler" in given or "use_ddim" in given or respacing:
        default = Plan(sampler)
    eta = config.eta if "eta" in given else default.eta
    spacing = config.timestep_spacing or suitable_spacing(sampler, eta, diffusion)
    if respacing and sampler not in ("ddpm", "ddim"):
        raise ValueError(
            f"--timestep_respacing {respacing}: goes with --sampler ddpm or ddim; give --sample_steps to {sampler}"
        )
    if eta and sampler not in WITH_ETA:
        raise ValueError(
            f"--eta {eta}: is for --sampler {' and '.join(WITH_ETA)} only; leave it out with {sampler}"
        )

    every_timestep = bool(respacing) or (
        "sample_steps" not in given and (sampler == "ddpm" or "use_ddim" in given)
    )
    if every_timestep and config.timestep_spacing:
        what = f"--timestep_respacing {respacing}" if respacing else f"all timesteps of {sampler}"
        raise ValueError(
            f"--timestep_spacing {config.timestep_spacing}: contradicts {what}; give --sample_steps instead"
        )
    steps, timesteps = config.sample_steps, diffusion.num_timesteps
    if "sample_steps" in given and steps > timesteps:
        raise ValueError(
            f"--sample_steps {steps}: this model has {timesteps} timesteps; give at most {timesteps}"
        )
    return Plan(
        sampler=sampler,
        steps=None if every_timestep else min(steps, timesteps),
        spacing=spacing,
        eta=eta,
        clip_denoised=config.clip_denoised,
    )


def warn_of_youth(images: int) -> None:
    """Print a note if a model has seen too few training images to draw anything. :param images: 0 if unknown."""
    if 0 < images < YOUNG:
        print(
            f"note: this model was trained on {images:,} image{'s' if images > 1 else ''} only, too few to draw more "
            "than noise or blurs; train it longer"
        )


def choose_labels(config: Flags, class_names: list[str]) -> list[int] | None:
    """The numbers of the classes in --class_label, by default all; None for a model without classes.

    :raises ValueError: the model has no such class, or no classes at all.
    """
    if config.class_cond:
        with errors_about("class_label"):
            return parse_class_labels(config.class_label, count_classes(config), class_names)
    if config.class_label:
        raise ValueError(
            f"--class_label {config.class_label}: this model was trained without classes; leave the flag out"
        )
    return None


def draw_into(
    out_dir: str,
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    plan: Plan,
    subject: Subject,
    config: DrawingFlags,
    *,
    count: int,
    rows: np.ndarray | None,
    doing: str,
) -> int:
    """Draw the first `count` images of `subject`, and write them into `out_dir` in the formats of the flags.

    :param rows: the row of each image in the picture (see `pictures.image_grid`).
    :param doing: a word for the work, such as "drawing".
    :return: the exit code.
    """
    steps = plan.count_steps(diffusion, subject.edit)
    scale = getattr(config, "guidance_scale", 1)
    guidance = "" if scale == 1 else f", guidance {scale:g}"
    print(f"{doing} {count} images with {plan.sampler} in {steps} steps each{guidance}, into {out_dir}")
    batches = sample_images(
        model,
        diffusion,
        plan,
        subject,
        num_samples=count,
        batch_size=config.batch_size,
        frames=MAX_FRAMES if config.save_trajectory else 1,
        progress=doing,
    )
    return save_samples(
        batches,
        out_dir,
        labels=subject.labels,
        rows=rows,
        save_png=config.save_png,
        save_trajectory=config.save_trajectory,
    )
