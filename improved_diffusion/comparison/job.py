"""A comparison of samplers from the first image to the last table: draw, measure, and report at once."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import blobfile as bf
import numpy as np

from improved_diffusion import dist_util
from improved_diffusion.comparison import report
from improved_diffusion.comparison.gallery import Gallery
from improved_diffusion.comparison.picture import SHOWN
from improved_diffusion.comparison.plan import Comparison, cell_name, difference, exact_plan, parse_comparison
from improved_diffusion.config import ComparingConfig, GuidanceFlags
from improved_diffusion.evaluation.measuring import measure, reference_statistics
from improved_diffusion.flags import defaults
from improved_diffusion.image_datasets import describe
from improved_diffusion.jobs.evaluate import open_extractor
from improved_diffusion.jobs.runs import choose_out_dir, open_model
from improved_diffusion.jobs.sample import choose_labels, guided
from improved_diffusion.samplers import evaluations
from improved_diffusion.script_util import (
    check_images_fit,
    join_processes,
    model_and_diffusion_defaults,
    read_flag,
)

FEATURE_BATCH = 4  # images that a core measures at a time


def compare(
    comparison: Comparison,
    gallery: Gallery,
    measured: Callable[[np.ndarray], dict[str, float]],
    facts: dict[str, Any],
    out_dir: str,
) -> dict[str, Any]:
    """Draw and measure all images of `comparison`, and write the reports into `out_dir` after every cell.

    A cell holds the images and measurements of one sampler, number of steps and seed.

    :param measured: the metrics of images, uint8 [N, H, W, C], by the names of `metrics.compare`.
    :param facts: further entries of the record (see `report.write`). Cells that were measured in the same
        "setting" are not measured again.
    :return: the record.
    """
    cells = report.known_cells(out_dir, facts["setting"])
    record = {
        **facts,
        "images": comparison.images,
        "exact_images": comparison.exact_images,
        "seeds": comparison.seeds,
        "samplers": comparison.samplers,
        "steps": comparison.steps,
        "cells": cells,
    }
    plans, exact = comparison.plans(), exact_plan(facts["timesteps"])
    shown = {}
    done = 0
    for seed in comparison.seeds:
        print(f"seed {seed}, for the exact solution: {comparison.exact_images} images in {exact.steps} steps")
        solution, _ = gallery.images(exact, seed, comparison.exact_images)
        shown[cell_name(exact, seed)] = solution[:SHOWN]
        for plan in plans:
            name = cell_name(plan, seed)
            images, seconds = gallery.images(plan, seed, comparison.images)
            shown[name] = images[:SHOWN]
            # A record of an earlier version may lack some of them.
            if not cells.get(name, {}).keys() >= {"distance", *report.METRICS}:
                metrics = measured(images)
                error = None if plan.is_random else difference(images[: len(solution)], solution)
                cells[name] = {
                    "evaluations": evaluations(plan.sampler, plan.steps or facts["timesteps"]),
                    "distance": metrics["frechet_distance"],
                    **{key: metrics.get(key) for key in report.METRICS},
                    "difference": error,
                }
            cells[name]["seconds"] = seconds
            report.write(out_dir, record, shown)
            done += 1
            print(
                f"{done}/{len(plans) * len(comparison.seeds)}: {name}, {seconds:.3g} s per image, "
                f"{facts['metric']} {cells[name]['distance']:.4g}, "
                f"{facts['kernel_metric']} {cells[name]['kernel_distance']:.4g}",
                flush=True,
            )
    return record


def run_comparison(config: ComparingConfig, given: set[str], project: str) -> None:
    """Do what the command line of compare_samplers.py asks for.

    :param config, given: of `Parser.parse_flags`.
    :param project: the folder with ``models`` and ``runs``, and ``samples``, where results go by default.
    :raises ValueError: a flag does not fit the model, or the images to compare with are unusable.
    """
    join_processes(config)
    opened = open_model(config, given, project)
    comparison = parse_comparison(config, opened.diffusion)
    config = opened.config
    check_images_fit(config, "batch_size", bytes_per_number=4)
    if dist_util.get_world_size() > 1:
        raise ValueError("several processes cannot share this work; start one, which uses all cores")
    comparison.check_steps(opened.diffusion.num_timesteps)
    check_images_fit(config, "num_samples", bytes_per_number=1)
    labels = choose_labels(config, opened.class_names)
    model = guided(opened.model, config, opened.diffusion, opened.class_names)
    extractor = open_extractor(config)
    reference = read_flag("reference", config.reference, config.output_size)
    print(f"reference: {describe(reference)}")
    real = reference_statistics(reference, extractor, FEATURE_BATCH)

    out_dir = choose_out_dir(config.log_dir, os.path.join(project, "samples"))
    print(f"To continue after an interruption, give the same command with --log_dir {out_dir}")
    with bf.BlobFile(opened.path, "rb") as file:
        weights = hashlib.sha256(file.read()).hexdigest()
    drawn_with = {
        "weights": weights,
        "precision": opened.compute.precision,
        "class_label": labels,
        **_guidance(config),
        **{name: value for name, value in config.to_dict().items() if name in model_and_diffusion_defaults()},
    }
    gallery = Gallery(
        bf.join(out_dir, "cells"),
        model,
        opened.diffusion,
        image_size=config.output_size,
        channels=config.colour_channels,
        labels=labels,
        batch_size=config.batch_size,
        drawn_with=drawn_with,
    )
    facts = {
        "model": opened.path,
        "computing": str(opened.compute),
        "guidance": _guidance(config),
        "timesteps": opened.diffusion.num_timesteps,
        "metric": extractor.metric("frechet_distance"),
        "kernel_metric": extractor.metric("kernel_distance"),
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
    measured = partial(measure, real, extractor=extractor, batch_size=FEATURE_BATCH)
    record = compare(comparison, gallery, measured, facts, out_dir)
    print(f"\n{report.markdown(record)}\nwritten: {bf.join(out_dir, 'comparison.md')}, .json, .png")


def _guidance(config: ComparingConfig) -> dict[str, Any]:
    """The flags of the guidance that differ from their defaults."""
    return {
        name: getattr(config, name)
        for name, default in defaults(GuidanceFlags).items()
        if getattr(config, name) != default
    }
