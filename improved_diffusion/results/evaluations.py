"""The charts of held-out losses and evaluations, and the evaluations that can be compared with each other."""

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
# The columns that must agree in the evaluations of a line, and their part in the name of the line.
KEY_COLUMNS = {
    "weights": "{}",
    "images": "{} images",
    "reference_images": "against {}",
    "features": "{}",
}


def comparable(
    evaluations: Table, x: np.ndarray, values: np.ndarray, first: str = "weights"
) -> list[tuple[str, slice]]:
    """Group the rows into lines of a chart: neighbours that agree in the columns `KEY_COLUMNS` and `first`.

    :param x, values: float64 [rows]; rows that are not finite in both are left out.
    :param first: the column that is always part of a line's name. The others are, if they differ between lines.
    :return: the name of each line, and its rows.
    """
    key_columns = {first: "{}", **KEY_COLUMNS}
    places = [evaluations.columns.index(name) for name in key_columns]
    keys = [
        tuple(text.format(row[place]) for place, text in zip(places, key_columns.values()))
        if math.isfinite(position) and math.isfinite(value)
        else None
        for row, position, value in zip(evaluations.rows, x, values)
    ]
    several = [len({key[part] for key in keys if key}) > 1 for part in range(len(key_columns))]
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
