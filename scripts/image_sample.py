"""Draw images from a trained model, as an .npz file and a picture. `--help` explains every flag."""

import os
from typing import Any

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

import numpy as np
import torch as th

from improved_diffusion.flags import Parser, add_dict_to_argparser
from improved_diffusion.jobs.runs import choose_out_dir, open_model
from improved_diffusion.jobs.sample import DRAWING, SOLVING, choose_labels, choose_plan, draw_into
from improved_diffusion.sample_util import Plan, Subject, guide, interpolate, per_image_noise
from improved_diffusion.script_util import (
    check_images_fit,
    count_classes,
    diffusion_defaults,
    model_defaults,
    run_script,
)

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SAMPLING = {**DRAWING, "guidance_scale": 1.0, "interpolate": False}
INTERPOLATED = 10  # images from one latent to the other, unless --num_samples says otherwise
MAX_ROWS = 10


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, SAMPLING, "sampling")
    add_dict_to_argparser(parser, SOLVING, "sampler")
    add_dict_to_argparser(parser, model_defaults(), "model (read from the checkpoint)")
    add_dict_to_argparser(
        parser, diffusion_defaults(), "diffusion (read from the checkpoint but for respacing)"
    )
    return parser


def main() -> int:
    flags, given = create_parser().parse_flags()
    model, diffusion, flags, class_names = open_model(flags, given, PROJECT)
    plan = choose_plan(flags, given, diffusion)
    if flags["interpolate"] and "num_samples" not in given:
        flags["num_samples"] = INTERPOLATED
    check_images_fit(flags, "num_samples", bytes_per_number=1)
    labels = choose_labels(flags, class_names)
    if flags["guidance_scale"] != 1:
        if not flags["class_dropout"]:
            raise ValueError(
                f"--guidance_scale {flags['guidance_scale']}: this model was trained without --class_dropout"
            )
        model = guide(model, flags["guidance_scale"], null_label=count_classes(flags))
    subject, rows = (
        describe_interpolation(flags, plan, labels) if flags["interpolate"] else describe(flags, labels)
    )

    out_dir = choose_out_dir(flags, os.path.join(PROJECT, "samples"))
    count = flags["num_samples"] if subject.latents is None else len(subject.latents)
    return draw_into(out_dir, model, diffusion, plan, subject, flags, count=count, rows=rows, doing="drawing")


def describe(flags: dict[str, Any], labels: list[int] | None) -> tuple[Subject, np.ndarray | None]:
    """Independent images, of all classes asked for in turn, and the rows of their grid: the classes."""
    labels = None if labels is None else np.resize(labels, flags["num_samples"])
    return Subject(flags["image_size"], flags["seed"], labels), labels


def describe_interpolation(
    flags: dict[str, Any], plan: Plan, labels: list[int] | None
) -> tuple[Subject, np.ndarray | None]:
    """Images between numbers 0 and 1 of the seed, in a row; a row for each of at most `MAX_ROWS` classes."""
    if plan.is_random:
        raise ValueError(
            f"--interpolate True: needs a sampler that adds no noise on the way, not {plan.sampler}"
            + (f" with --eta {plan.eta}" if plan.eta else "")
        )
    points, size = flags["num_samples"], flags["image_size"]
    ends = per_image_noise(flags["seed"], range(2))(th.empty(2, 3, size, size))
    classes = labels[:MAX_ROWS] if labels else [0]
    rows = np.repeat(classes, points)
    latents = interpolate(*ends, points).repeat(len(classes), 1, 1, 1)
    return Subject(size, flags["seed"], rows if labels else None, latents=latents), rows


if __name__ == "__main__":
    run_script(main)
