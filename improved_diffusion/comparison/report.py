"""The results of a comparison of samplers: JSON, tables in Markdown, and a picture."""

import contextlib
import json
import os
from typing import Any

import blobfile as bf
import numpy as np

from improved_diffusion.comparison.picture import comparison_picture
from improved_diffusion.comparison.plan import BASELINE, Solver, cell_name, exact_plan
from improved_diffusion.sample_util import Plan
from improved_diffusion.storage import open_atomic, write_json

METRICS = ("kernel_distance", "precision", "recall")  # of a cell, besides its "distance"
JSON, MARKDOWN, PICTURE = "comparison.json", "comparison.md", "comparison.png"


def known_cells(out_dir: str, setting: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Earlier measurements in `out_dir` that were made in the same setting, by the cell's name."""
    # An unreadable record means that all is measured again.
    with contextlib.suppress(OSError, bf.Error, ValueError, RecursionError):
        with bf.BlobFile(bf.join(out_dir, JSON), "rb") as file:
            record = json.load(file)
        if isinstance(record, dict) and record.get("setting") == setting:
            return record.get("cells", {})
    return {}


def write(out_dir: str, record: dict[str, Any], images: dict[str, np.ndarray]) -> None:
    """Write the three files from the results so far.

    :param record: "model", "computing", "guidance" (its flags), "timesteps", "metric", "kernel_metric",
        "features_length", "reference" and "reference_images", "images" (of each cell) and "exact_images", "seeds",
        "samplers" (each a `Solver`), "steps", "setting", and "cells": by name, "evaluations" and "seconds" (of
        one image), "distance" and "difference" (None for random samplers), and `METRICS` (None for too few images).
    :param images: the first images, uint8 [n, S, S, 3], of the cells of the first seed, by name.
    """
    write_json(bf.join(out_dir, JSON), record)
    with open_atomic(bf.join(out_dir, MARKDOWN), "w") as file:
        file.write(markdown(record))
    with open_atomic(bf.join(out_dir, PICTURE)) as file:
        comparison_picture(record, images).save(file, format="PNG")


def markdown(record: dict[str, Any]) -> str:
    """The tables: a row for each sampler, a column for each number of steps."""
    seeds, count, exact = record["seeds"], record["images"], exact_plan(record["timesteps"])
    drawn = f"{count:,} images of seed {seeds[0]}"
    if len(seeds) > 1:
        drawn = (
            f"{count:,} images of each of the seeds {', '.join(map(str, seeds))}, mean +- standard deviation over "
            "the seeds"
        )
    guidance = "".join(f", --{name} {value}" for name, value in record.get("guidance", {}).items())
    lines = [
        f"{drawn}. Model: `{os.path.basename(record['model'])}`, {record['timesteps']:,} timesteps, computed in "
        f"{record['computing']}{guidance}.",
        "",
        f"**{record['metric']}** to the {record['reference_images']:,} images of "
        f"`{os.path.basename(record['reference'])}`; lower is better:",
        "",
        *_table(record, "distance"),
        "",
    ]
    baseline = _values(record, BASELINE, "distance")
    if baseline:
        seconds = np.mean(_values(record, BASELINE, "seconds"))
        others = [
            f"{words} {_spread(values)}"
            for words, key in (("kernel distance", "kernel_distance"), ("recall", "recall"))
            if (values := _values(record, BASELINE, key))
        ]
        found = ", ".join([_spread(baseline), *others])
        lines += [
            f"ddpm at all {record['timesteps']:,} timesteps: {found}, at {seconds:.3g} seconds per image.",
            "",
        ]
    if count <= record["features_length"]:
        lines += [
            f"{count:,} images are few for {record['features_length']:,} features: these distances are too large, "
            "so compare them only with each other.",
            "",
        ]
    lines += [
        f"**{record['kernel_metric']}** to the same images; lower is better. The number of images does not bias it:",
        "",
        *_table(record, "kernel_distance"),
        "",
        "**Recall** (precision): the share of the real images that the drawn ones cover, and the share of the drawn "
        "ones that look real; higher is better. Recall alone means little, because scattered images cover much:",
        "",
        *_table(record, "recall"),
        "",
        f"**Error in grey levels** (of 255): the root mean square difference from what {exact.sampler} makes of the "
        f"same noise in {exact.steps} steps ({record['exact_images']} images of each seed). It shows how well the ODE "
        "is solved, not how good the images are:",
        "",
        *_table(record, "difference"),
        "",
        "**Seconds per image** (evaluations of the model):",
        "",
        *_table(record, "seconds"),
    ]
    return "\n".join(lines) + "\n"


def _table(record: dict[str, Any], key: str) -> list[str]:
    """The lines of a table. The best value of a column is bold, except in tables of times."""
    best = max if key == "recall" else min
    columns = []
    solvers = [Solver(*entry) for entry in record["samplers"]]
    for steps in record["steps"]:
        plans = [solver.plan(steps) for solver in solvers]
        found = [_values(record, plan, key) for plan in plans]
        if key == "seconds":
            counts = [_values(record, plan, "evaluations") for plan in plans]
            texts = [f"{np.mean(v):.3g} ({n[0]})" if v else "-" for v, n in zip(found, counts)]
        else:
            wanted = best((np.mean(values) for values in found if values), default=None)
            texts = [_spread(values) if values else "-" for values in found]
            texts = [f"**{t}**" if v and np.mean(v) == wanted else t for t, v in zip(texts, found)]
            if key == "recall":
                shares = [_values(record, plan, "precision") for plan in plans]
                texts = [f"{t} ({np.mean(v):.2f})" if v else t for t, v in zip(texts, shares)]
        columns.append([f"{steps} steps", *texts])
    labels = [("sampler", "spacing"), *((str(solver), solver.spacing) for solver in solvers)]
    lines = ["| " + " | ".join([*label, *texts]) + " |" for label, *texts in zip(labels, *columns)]
    return [lines[0], "|---|---|" + "--:|" * len(columns), *lines[1:]]


def _values(record: dict[str, Any], plan: Plan, key: str) -> list[float]:
    """The measurements of the plan so far, one for each seed."""
    found = (record["cells"].get(cell_name(plan, seed), {}).get(key) for seed in record["seeds"])
    return [value for value in found if value is not None]


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.4g}"
    return f"{mean} +- {np.std(values, ddof=1):.2g}" if len(values) > 1 else mean
