"""Compare samplers on a model of yours: how close to real images each comes in more and more steps, how well it solves
the ODE, how long it takes, and what it makes of the same noise. `--help` explains every flag.

Each takes the --timestep_spacing that suits it, unless that flag or --samplers says otherwise. All images are kept in
--log_dir: the same command, given again, goes on where it was interrupted. The tables and the picture are written anew
whenever the images of a sampler, number of steps and seed are complete.
"""

import hashlib
import os
from functools import partial

if __name__ == "__main__":  # before what takes seconds to import
    from improved_diffusion.run import terminal

    terminal.start()

import blobfile as bf

from improved_diffusion import dist_util
from improved_diffusion.comparison import report
from improved_diffusion.comparison.gallery import Gallery
from improved_diffusion.comparison.job import compare
from improved_diffusion.comparison.plan import COMPARING, parse_comparison
from improved_diffusion.cpu.compute import choose
from improved_diffusion.evaluation.features import INCEPTION, load_extractor
from improved_diffusion.evaluation.measuring import distance_to, read_flag, reference_statistics
from improved_diffusion.flags import Parser, add_dict_to_argparser, args_to_dict
from improved_diffusion.image_datasets import describe
from improved_diffusion.jobs.runs import choose_out_dir, open_model
from improved_diffusion.jobs.sample import DRAWING, choose_labels
from improved_diffusion.script_util import (
    check_images_fit,
    diffusion_defaults,
    model_and_diffusion_defaults,
    model_defaults,
    run_script,
)

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

DRAWN = ("model_path", "class_label", "batch_size", "log_dir", "precision", "num_workers")
MEASURED = {"reference": "", "features": INCEPTION, "inception_weights": ""}
FEATURE_BATCH = 4  # images that a core measures at a time


def create_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_dict_to_argparser(parser, COMPARING, "comparison")
    add_dict_to_argparser(parser, args_to_dict(DRAWING, DRAWN), "sampling")
    add_dict_to_argparser(parser, MEASURED, "evaluation")
    add_dict_to_argparser(parser, model_defaults(), "model (read from the checkpoint)")
    add_dict_to_argparser(parser, diffusion_defaults(), "diffusion (read from the checkpoint)")
    return parser


def main() -> None:
    flags, given = create_parser().parse_flags()
    comparison = parse_comparison(flags)
    if not flags["reference"]:
        raise ValueError("--reference is missing: give the training images, an .npz file or a folder")
    flags["seed"] = comparison.seeds[0]
    model, diffusion, flags, class_names = open_model(flags, given, PROJECT)
    if dist_util.get_world_size() > 1:
        raise ValueError("several processes cannot share this work; start one, which uses all cores")
    comparison.check_steps(diffusion.num_timesteps)
    check_images_fit(flags, "num_samples", bytes_per_number=1)
    labels = choose_labels(flags, class_names)
    extractor = load_extractor(flags["features"], flags["inception_weights"])
    reference = read_flag("reference", flags["reference"], flags["image_size"])
    print(f"reference: {describe(reference)}")
    real = reference_statistics(reference, extractor, FEATURE_BATCH)

    out_dir = choose_out_dir(flags, os.path.join(PROJECT, "samples"))
    print(f"To go on after an interruption, give the same command with --log_dir {out_dir}")
    compute = choose(flags["precision"], flags["num_workers"])
    with bf.BlobFile(flags["model_path"], "rb") as file:
        weights = hashlib.sha256(file.read()).hexdigest()
    drawn_with = {
        "weights": weights,
        "precision": compute.precision,
        "class_label": labels,
        **args_to_dict(flags, model_and_diffusion_defaults()),
    }
    gallery = Gallery(
        bf.join(out_dir, "cells"),
        model,
        diffusion,
        image_size=flags["image_size"],
        labels=labels,
        batch_size=flags["batch_size"],
        drawn_with=drawn_with,
    )
    facts = {
        "model": flags["model_path"],
        "computing": str(compute),
        "timesteps": diffusion.num_timesteps,
        "metric": extractor.metric("frechet_distance"),
        "features_length": len(real.mean),
        "reference": reference.summary["source"],
        "reference_images": len(reference),
        "setting": {
            **drawn_with,
            "num_samples": comparison.images,
            "features": extractor.fingerprint,
            "reference": reference.fingerprint,
        },
    }
    distance = partial(distance_to, real, extractor=extractor, batch_size=FEATURE_BATCH)
    record = compare(comparison, gallery, distance, facts, out_dir)
    print(f"\n{report.markdown(record)}\nwritten: {bf.join(out_dir, 'comparison.md')}, .json, .png")


if __name__ == "__main__":
    run_script(main)
