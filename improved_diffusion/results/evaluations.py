"""The charts of held-out losses and evaluations, and which evaluations can be compared with each other."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from improved_diffusion.results.charts import AUTO, DARK, FITTED, PALETTE, Line
from improved_diffusion.results.columns import HELD_OUT, HELD_OUT_LOSS
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


def evaluation_plots(evaluations: Table) -> list[tuple[str, list[Line]]]:
    """The title and the lines of each chart: metrics over the step, a line for each kind of weights."""
    plots = [
        (title, _metric_lines(evaluations, metric))
        for title, metrics in EVALUATION_CHARTS
        for metric in metrics
    ]
    return [(title, lines) for title, lines in plots if lines]


def _metric_lines(evaluations: Table, metric: str) -> list[Line]:
    if metric not in evaluations.columns:
        return []
    steps, values = evaluations.column("step"), evaluations.column(metric)
    x_column, y_column = (1 + evaluations.columns.index(name) for name in ("step", metric))
    return [
        Line(
            title,
            PALETTE[number % len(PALETTE)],
            x_column,
            y_column,
            2 + part.start,
            steps[part],
            values[part],
            markers=True,
        )
        for number, (title, part) in enumerate(comparable(evaluations, steps, values))
    ]


def heldout_plots(checkpoints: Table, columns: Sequence[str]) -> list[tuple[str, str, list[Line]]]:
    """The title, the scale and the lines of each chart: the mean, and the noise levels.

    :param columns: of the sheet, in the order in which they stand there.
    """
    steps = checkpoints.column("step")
    means, levels = [], []
    for name in columns:
        values = checkpoints.column(name)
        if name.startswith(HELD_OUT) and np.isfinite(values).any():
            is_mean = name == HELD_OUT_LOSS
            colour = DARK if is_mean else PALETTE[len(levels) % len(PALETTE)]
            line = Line(
                name,
                colour,
                1 + columns.index("step"),
                1 + columns.index(name),
                2,
                steps,
                values,
                markers=True,
            )
            (means if is_mean else levels).append(line)
    plots = [("Held-out loss", FITTED, means), ("Held-out loss by noise level", AUTO, levels)]
    return [plot for plot in plots if plot[2]]
