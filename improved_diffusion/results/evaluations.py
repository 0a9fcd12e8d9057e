"""Which evaluations can be compared with each other, and which of their metrics have a chart."""

import itertools
import math

import numpy as np

from improved_diffusion.results.read import Table

EVALUATION_CHARTS = (
    ("Frechet distance", ("fid", "frechet_distance")),
    ("Kernel distance", ("kid", "kernel_distance")),
    ("Precision", ("precision",)),
    ("Recall", ("recall",)),
    ("Class accuracy", ("class_accuracy",)),
)
# What must be alike in evaluations that share a line, and how its name says what it is.
TOLD_APART = {
    "weights": "{}",
    "images": "{} images",
    "reference_images": "against {}",
    "features": "{}",
}


def comparable(
    evaluations: Table, x: np.ndarray, values: np.ndarray, first: str = "weights"
) -> list[tuple[str, slice]]:
    """The rows that belong on one line: neighbours that agree in the columns `TOLD_APART` and `first`.

    :param x, values: float64 [rows]; rows without a finite number in both have no place in a chart.
    :param first: the column that always stands in the name of a line; the others only where they differ.
    :return: the name of each line, and its rows.
    """
    told_apart = {first: "{}", **TOLD_APART}
    places = [evaluations.columns.index(name) for name in told_apart]
    keys = [
        tuple(text.format(row[place]) for place, text in zip(places, told_apart.values()))
        if math.isfinite(position) and math.isfinite(value)
        else None
        for row, position, value in zip(evaluations.rows, x, values)
    ]
    several = [len({key[part] for key in keys if key}) > 1 for part in range(len(told_apart))]
    several[0] = True
    lines = []
    for key, group in itertools.groupby(range(len(keys)), key=keys.__getitem__):
        if key is not None:
            members = list(group)
            title = ", ".join(itertools.compress(key, several))
            lines.append((title, slice(members[0], members[-1] + 1)))
    return lines
