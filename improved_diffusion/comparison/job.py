"""A comparison of samplers from the first image to the last table: draw, measure, and report at once."""

from collections.abc import Callable
from typing import Any

import numpy as np

from improved_diffusion.comparison import report
from improved_diffusion.comparison.gallery import Gallery
from improved_diffusion.comparison.picture import SHOWN
from improved_diffusion.comparison.plan import Comparison, cell_name, difference, exact_plan
from improved_diffusion.samplers import evaluations


def compare(
    comparison: Comparison,
    gallery: Gallery,
    distance: Callable[[np.ndarray], float],
    facts: dict[str, Any],
    out_dir: str,
) -> dict[str, Any]:
    """Draw and measure all images of `comparison`, and write the reports into `out_dir` after every cell.

    A cell holds the images and measurements of one sampler, number of steps and seed.

    :param distance: measures images, uint8 [N, S, S, 3].
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
            if name not in cells:
                error = None if plan.is_random else difference(images[: len(solution)], solution)
                cells[name] = {
                    "evaluations": evaluations(plan.sampler, plan.steps or facts["timesteps"]),
                    "distance": distance(images),
                    "difference": error,
                }
            cells[name]["seconds"] = seconds
            report.write(out_dir, record, shown)
            done += 1
            print(
                f"{done}/{len(plans) * len(comparison.seeds)}: {name}, {seconds:.3g} s per image, "
                f"{facts['metric']} {cells[name]['distance']:.4g}",
                flush=True,
            )
    return record
