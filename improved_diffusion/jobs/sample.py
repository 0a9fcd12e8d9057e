"""A drawing job: what image_sample.py and super_res_sample.py have in common, from their flags to the exit code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from improved_diffusion.data.class_labels import parse_class_labels
from improved_diffusion.flags import check_range
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.pictures import save_samples
from improved_diffusion.sample_util import (
    DEFAULT_PLAN,
    DETERMINISTIC_PLAN,
    Plan,
    Subject,
    sample_images,
)
from improved_diffusion.samplers import SAMPLERS, SPACINGS
from improved_diffusion.script_util import count_classes

SOLVING = {
    "sampler": DEFAULT_PLAN.sampler,
    "sample_steps": DEFAULT_PLAN.steps,
    "timestep_spacing": DEFAULT_PLAN.spacing,
    "eta": DEFAULT_PLAN.eta,
    "use_ddim": False,
    "clip_denoised": True,
}
DRAWING = {
    "model_path": "",
    "num_samples": 64,
    "batch_size": 16,
    "class_label": "",
    "seed": 0,
    "log_dir": "",
    "save_png": False,
    "save_trajectory": False,
    "precision": "auto",
    "num_workers": "auto",
}
MAX_FRAMES = 60  # of an animation


def choose_plan(flags: dict[str, Any], given: set[str], diffusion: GaussianDiffusion) -> Plan:
    """The way from noise to image that the flags of `SOLVING`, --timestep_respacing and --interpolate ask for.

    Without a sampler that is `DEFAULT_PLAN`, or where images are interpolated, `DETERMINISTIC_PLAN`.

    Who gives --use_ddim or --timestep_respacing, the flags of improved-diffusion, and no sampler or number of
    steps, gets what they mean there: ancestral sampling or DDIM at every timestep that is left. So does who gives
    --sampler ddpm alone.

    :param given: the names of the flags that the user gave; the others have their defaults.
    :param diffusion: that of the model, respaced where --timestep_respacing says so.
    :raises ValueError: a value is impossible, or two flags contradict each other.
    """
    _check_values(flags)
    default = DETERMINISTIC_PLAN if flags.get("interpolate") else DEFAULT_PLAN
    respacing = flags["timestep_respacing"]
    if "sampler" in given:
        sampler = flags["sampler"]
        if "use_ddim" in given and flags["use_ddim"] != (sampler == "ddim"):
            raise ValueError(
                f"--use_ddim {flags['use_ddim']}: contradicts --sampler {sampler}; leave one of them out"
            )
    elif respacing or "use_ddim" in given:
        sampler = "ddim" if flags["use_ddim"] else "ddpm"
    else:
        sampler = default.sampler
    if "sampler" in given or "use_ddim" in given or respacing:
        default = Plan(sampler)  # what suits most
    spacing = flags["timestep_spacing"] if "timestep_spacing" in given else default.spacing
    eta = flags["eta"] if "eta" in given else default.eta
    if respacing and sampler not in ("ddpm", "ddim"):
        raise ValueError(
            f"--timestep_respacing {respacing}: goes with --sampler ddpm or ddim; give --sample_steps to {sampler}"
        )
    if respacing and "sample_steps" in given:
        raise ValueError(
            f"--timestep_respacing {respacing}: contradicts --sample_steps {flags['sample_steps']}; leave one out"
        )
    if eta and sampler != "ddim":
        raise ValueError(f"--eta {eta}: only --sampler ddim has a choice; leave it out with {sampler}")

    every_timestep = bool(respacing) or (
        "sample_steps" not in given and (sampler == "ddpm" or "use_ddim" in given)
    )
    if every_timestep and "timestep_spacing" in given:
        what = f"--timestep_respacing {respacing}" if respacing else f"all timesteps of {sampler}"
        raise ValueError(
            f"--timestep_spacing {flags['timestep_spacing']}: contradicts {what}; give --sample_steps instead"
        )
    steps, timesteps = flags["sample_steps"], diffusion.num_timesteps
    if "sample_steps" in given and steps > timesteps:
        raise ValueError(f"--sample_steps {steps}: this model has {timesteps} timesteps; give that at most")
    return Plan(
        sampler=sampler,
        steps=None if every_timestep else min(steps, timesteps),
        spacing=spacing,
        eta=eta,
        clip_denoised=flags["clip_denoised"],
    )


def _check_values(flags: dict[str, Any]) -> None:
    for name, known in (("sampler", SAMPLERS), ("timestep_spacing", SPACINGS)):
        if flags[name] not in known:
            raise ValueError(f"--{name} {flags[name]!r}: expected one of {', '.join(known)}")
    check_range(flags, {"sample_steps": 1})
    if not 0 <= flags["eta"] <= 1:
        raise ValueError(f"--eta {flags['eta']}: must lie in [0, 1]")


def choose_labels(flags: dict[str, Any], class_names: list[str]) -> list[int] | None:
    """The classes that --class_label asks for, by default all; None for a model without classes.

    :raises ValueError: the model knows no such class, or none at all.
    """
    if flags["class_cond"]:
        return parse_class_labels(flags["class_label"], count_classes(flags), class_names)
    if flags["class_label"]:
        raise ValueError(f"--class_label {flags['class_label']}: this model was trained without classes")
    return None


def draw_into(
    out_dir: str,
    model: Callable[..., th.Tensor],
    diffusion: GaussianDiffusion,
    plan: Plan,
    subject: Subject,
    flags: dict[str, Any],
    *,
    count: int,
    rows: np.ndarray | None,
    doing: str,
) -> int:
    """Draw the first `count` images of `subject` and write them into `out_dir`, as the flags of `DRAWING` say.

    :param rows: which images are to share a row of the picture (see `pictures.image_grid`).
    :param doing: a word for what is being done.
    :return: the exit code.
    """
    print(
        f"{doing} {count} images with {plan.sampler} in {plan.count_steps(diffusion)} steps each, into {out_dir}"
    )
    batches = sample_images(
        model,
        diffusion,
        plan,
        subject,
        num_samples=count,
        batch_size=flags["batch_size"],
        frames=MAX_FRAMES if flags["save_trajectory"] else 1,
        progress=doing,
    )
    return save_samples(
        batches,
        out_dir,
        labels=subject.labels,
        rows=rows,
        save_png=flags["save_png"],
        save_trajectory=flags["save_trajectory"],
    )
